"""The drafter and speculative rollout: tokens, distribution, alignment, masks, and what drafter training must not touch."""

import itertools
import random

import pytest
import torch
from conftest import cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_rollout import FAMILIES, groups_of

import drafter as drafter_module
import rollout
from drafter import Drafter, FeatureBuffer, LearnedDrafts, NGramDrafts, Trainer, drafter_loss, fit, pack
from rollout import Draft, Engine, Group, Response, Row, Sampling, sequence_seed
from tasks import UserError

SAMPLINGS = [Sampling(max_new=30), Sampling(temperature=0, max_new=30), Sampling(temperature=0.8, top_p=0.9, top_k=40, max_new=30)]


def make_drafter(model):
    torch.manual_seed(1)
    return Drafter(model)


def make_engine(model, drafter=None, slots=10, context=100, **kwargs):
    return Engine(model, {1}, slots, context, drafters={"learned": LearnedDrafts(drafter or make_drafter(model)), "ngram": NGramDrafts()}, **kwargs)


def changing(seed):
    """A strategy that changes kind, length and width at random every round, and is often off."""
    rng = random.Random(seed)

    def choose(live):
        k = rng.choice([0, 0, 1, 2, 3, 5, 8])
        return Draft(rng.choice(["learned", "ngram"]), k, rng.choice([1, 1, 2, 3] if k < 5 else [1, 2]))
    return choose


def fixed(kind, k, width=1):
    return lambda live: Draft(kind, k, width)


STRATEGIES = {**{f"chain {k}": fixed("learned", k) for k in range(1, 9)}, "tree 4x3": fixed("learned", 4, 3), "tree 8x2": fixed("learned", 8, 2),
              "n-gram": fixed("ngram", 4), "n-gram tree": fixed("ngram", 3, 2), "changing": changing(0)}


def check_identity(choose, sampling=SAMPLINGS[0], model=None, groups=None, slots=10, stop=(1,)):
    """Refills, row moves, mixed prompts: tokens equal to plain decoding, log-probabilities and features to 1e-4."""
    model = model or tiny()
    engine, groups = make_engine(model, slots=slots), groups or groups_of(12, random.Random(1))
    engine.stop_at(stop)
    plain = {(r.group, r.sample): r for r in engine.generate(groups, sampling)}
    spec = {(r.group, r.sample): r for r in engine.generate(groups, sampling, choose)}
    assert plain.keys() == spec.keys()
    for key, r in spec.items():
        assert r.tokens == plain[key].tokens and r.stopped == plain[key].stopped, key
        assert torch.allclose(r.logprobs, plain[key].logprobs, atol=1e-4) and torch.allclose(r.hidden, plain[key].hidden, atol=1e-3)
    return engine.stats


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_speculative_tokens_are_those_of_plain_decoding(name, sampling):
    check_identity(STRATEGIES[name], sampling)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_speculates(family):
    check_identity(changing(3), model=tiny(FAMILIES[family][0], **FAMILIES[family][1]))


@cases(15)
@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(1, 25), st.sets(st.integers(1, 117), min_size=1, max_size=20), st.sampled_from([0.0, 0.7, 1.0, 1.3]))
def test_identity_on_random_shapes(seed, slots, max_new, stop, temperature):
    check_identity(changing(seed), Sampling(temperature, max_new=max_new), groups=groups_of(7, random.Random(seed)), slots=slots, stop=stop)


@pytest.mark.parametrize("broken", ["siblings see each other", "accepted path not compacted", "row moves forget the drafter's length", "stale features"])
def test_broken_speculation_is_caught(broken, monkeypatch):
    if broken == "siblings see each other":
        whole = rollout.caterpillar
        monkeypatch.setattr(rollout, "caterpillar", lambda k, w, d: (whole(k, w, d)[0], whole(k, w, d)[0] <= whole(k, w, d)[0][:, None]))
        caught(check_identity, fixed("learned", 4, 3))
    elif broken == "accepted path not compacted":
        monkeypatch.setattr(rollout.SlotCache, "relocate", lambda *args: None)
        caught(check_identity, fixed("learned", 4, 3))
    else:  # these two cannot harm the tokens, only the guesses: that is what lossless means
        model = tiny()
        trained = trained_drafter(model)
        good = accepted_per_round(model, trained)
        if broken == "row moves forget the drafter's length":
            monkeypatch.setattr(LearnedDrafts, "move", lambda self, a, b: None)
        else:
            monkeypatch.setattr(LearnedDrafts, "admit", lambda self, rows: (self.have.__setitem__(rows, [30] * (rows.stop - rows.start)), self.known[rows].fill_(30)))
        check_identity(fixed("learned", 4))
        assert accepted_per_round(model, trained) < good


def trained_drafter(model, steps=150):
    engine, buffer, drafter = make_engine(model), FeatureBuffer(), make_drafter(model)
    for r in engine.generate(groups_of(30, random.Random(5)), SAMPLINGS[0]):
        buffer.add(r)
    trainer = Trainer(drafter, tokens=256)
    for _ in range(steps):
        trainer.step(buffer)
    return drafter


def accepted_per_round(model, drafter, k=4, groups=40):
    engine = make_engine(model, drafter)
    list(engine.generate(groups_of(groups, random.Random(1)), SAMPLINGS[0], fixed("learned", k)))
    return engine.stats["spec_tokens"] / engine.stats["spec_row_rounds"]


def test_sharing_the_noise_is_what_makes_guesses_right(monkeypatch):
    model = tiny()
    drafter = trained_drafter(model)
    coupled = accepted_per_round(model, drafter)
    whole = LearnedDrafts.propose
    monkeypatch.setattr(LearnedDrafts, "propose", lambda self, e, n, k, w, noise, s: whole(self, e, n, k, w, torch.zeros(()), s))  # argmax drafts
    assert accepted_per_round(model, drafter) < coupled


def test_stop_and_length_limit_inside_an_accepted_run():
    model = tiny()
    oracle = {}

    class Oracle(NGramDrafts):  # knows what comes: every draft is accepted, so stops and limits fall inside the run
        def propose(self, engine, n, k, width, noise, sampling):
            rows = [(oracle[r.group.index, r.sample][len(r.tokens):] + [7] * k)[:k] for r in engine.live]
            return torch.tensor(rows)[..., None], None
    groups = groups_of(12, random.Random(1))
    for sampling in (Sampling(max_new=29), Sampling(max_new=1)):
        engine = Engine(model, {1}, 10, 100, drafters={"oracle": Oracle()})
        oracle.update({(r.group, r.sample): r.tokens for r in engine.generate(groups, sampling)})
        for r in engine.generate(groups, sampling, lambda live: Draft("oracle", 8)):
            assert r.tokens == oracle[r.group, r.sample]
        assert engine.stats["rounds"] <= 40 and engine.stats["accepted"][0] > 0


# ---------------------------------------------------------------- distribution


def enumerate_exactly(model, prompt, length, sampling):
    """Probability of every response of that length over the vocabulary."""
    outcomes = list(itertools.product(range(model.config.vocab_size), repeat=length))
    ids = torch.tensor([prompt + list(o) for o in outcomes])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits[:, len(prompt) - 1:]
    p = rollout.narrow(logits, sampling)[1].log_softmax(-1).gather(-1, ids[:, len(prompt):, None])[..., 0].sum(-1).exp().double()
    return {o: x for o, x in zip(outcomes, p.tolist())}


def check_distribution(verify, k=2, count=16_000, width=1):
    """The engine's responses of 3 tokens over a vocabulary of 4 against exact enumeration: chi-square with 63 degrees of freedom at p = 1e-4."""
    model = tiny(vocab_size=4, pad_token_id=None, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    sampling, prompt = Sampling(temperature=0.8, max_new=3), [1, 2, 3]
    torch.manual_seed(2)
    drafter = Drafter(model)
    engine = Engine(model, {99}, 400, 16, drafters={"learned": LearnedDrafts(drafter)}, verify=verify)
    groups = [Group(i, prompt, [sequence_seed("d", i, j) for j in range(400)]) for i in range(count // 400)]
    counts = {}
    for r in engine.generate(groups, sampling, fixed("learned", k, width)):
        counts[tuple(r.tokens)] = counts.get(tuple(r.tokens), 0) + 1
    expected = enumerate_exactly(model, prompt, 3, sampling)
    assert set(counts) <= set(expected) and 0.05 < engine.stats["accepted"][0] / engine.stats["drafted"][0] < 1
    rare = sum(p for p in expected.values() if p * count < 5)  # pool the rare outcomes
    pairs = [(counts.get(o, 0), p * count) for o, p in expected.items() if p * count >= 5]
    if rare * count >= 5:
        pairs.append((sum(counts.get(o, 0) for o, p in expected.items() if p * count < 5), rare * count))
    assert sum((seen - want) ** 2 / want for seen, want in pairs) < 113


@pytest.mark.parametrize("verify, k, width", [("coupled", 2, 1), ("coupled", 2, 2), ("ratio", 1, 1), ("ratio", 2, 1), ("ratio", 3, 1)])
def test_responses_follow_the_exact_distribution(verify, k, width):
    check_distribution(verify, k, width=width)


@pytest.mark.parametrize("broken", ["argmax drafts", "wrong temperature in q", "last accepted token dropped", "positions off by one", "no residual"])
def test_broken_ratio_verification_is_caught(broken, monkeypatch):
    verify, propose, noise = rollout.verify_ratio, LearnedDrafts.propose, rollout.noise_for
    if broken == "argmax drafts":
        monkeypatch.setattr(LearnedDrafts, "propose", lambda self, e, n, k, w, g, s: propose(self, e, n, k, w, torch.zeros(()), s))
    elif broken == "wrong temperature in q":
        monkeypatch.setattr(rollout, "verify_ratio", lambda p, q, *rest: verify(p, q * 0.5, *rest))
    elif broken == "last accepted token dropped":
        def dropping(*args):
            y, logprob, accepted = verify(*args)
            return y, logprob, (accepted - 1).clamp(min=0)
        monkeypatch.setattr(rollout, "verify_ratio", dropping)
    elif broken == "positions off by one":
        monkeypatch.setattr(rollout, "verify_ratio", lambda p, q, *rest: verify(p, q.roll(1, 1), *rest))
    else:
        monkeypatch.setattr(rollout, "verify_ratio", lambda p, q, d, s, seeds, index: (lambda y, l, a: (torch.where(
            torch.arange(y.shape[1]) < a[:, None], y, (rollout.narrow(p, s)[1] + noise(s, seeds, index, p.shape[-1])).argmax(-1)), l, a))(*verify(p, q, d, s, seeds, index)))
    caught(check_distribution, "ratio", 2)


@pytest.mark.parametrize("sampling, choose", [(SAMPLINGS[1], fixed("learned", 4)), (SAMPLINGS[0], fixed("learned", 4, 3)), (SAMPLINGS[0], fixed("ngram", 4))])
def test_where_the_ratio_rule_does_not_apply_equality_does(sampling, choose):
    model, groups = tiny(), groups_of(6, random.Random(1))  # greedy, trees, and drafters without a q
    plain = {(r.group, r.sample): r.tokens for r in make_engine(model).generate(groups, sampling)}
    assert plain == {(r.group, r.sample): r.tokens for r in make_engine(model, verify="ratio").generate(groups, sampling, choose)}


def check_ratio_noise(stream):
    """One draft, far from the policy, 200,000 times: the emitted token follows p only if drafts and residual draw from different noise."""
    n, p, q = 200_000, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.1, 0.38, 0.02])
    seeds, index = torch.randint(-2**31, 2**31, (n, 2), generator=torch.Generator().manual_seed(0)).int(), torch.arange(2).expand(n, 2)
    drafts = (q.log() + rollout.noise_for(SAMPLINGS[0], seeds, index, 4, stream)[:, :1]).argmax(-1)
    y, _, _ = rollout.verify_ratio(p.log().expand(n, 2, 4), q.log().expand(n, 1, 4), drafts, SAMPLINGS[0], seeds, index)
    counts = torch.bincount(y[:, 0], minlength=4)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 21  # 3 degrees of freedom, p = 1e-4


def test_noise_shared_between_draft_and_residual_is_caught():
    check_ratio_noise(stream=1)
    caught(check_ratio_noise, stream=0)


# ---------------------------------------------------------------- alignment and packing


def responses_of(model, n=8):
    return list(make_engine(model, keep_hidden=True).generate(groups_of(n, random.Random(4)), SAMPLINGS[0]))


def check_alignment(packer):
    """What the training pass computes for entry t is what the engine computes there, on ragged prompts, whatever the gaps it catches up in."""
    model = tiny()
    drafter, responses, rng = make_drafter(model), [r for r in responses_of(model) if len(r.tokens) > 4], random.Random(0)
    with torch.no_grad():
        ids, features, _, positions, owner, _ = packer([(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses])
        trained = drafter(ids, features, drafter.angles(positions), drafter_module.block_mask(owner, positions, 2, features.dtype))[0]
        engine, learned = make_engine(model, drafter, verify="ratio"), LearnedDrafts(drafter)  # it asks for the logits, too
        learned.reserve(engine, 10, 120)
        learned.begin()
        rows = responses[:10]
        made = [1] * len(rows)
        for i, r in enumerate(rows):
            engine.tokens[i, :len(r.prompt) + len(r.tokens)] = torch.tensor(r.prompt + r.tokens)
            engine.hidden[i, :len(r.hidden)] = r.hidden
        checked = 0
        for _ in range(6):
            engine.live = [Row(Group(0, r.prompt, []), 0, r.tokens[:m]) for r, m in zip(rows, made)]
            engine.lens[:len(rows)] = torch.tensor([row.length for row in engine.live])
            _, logits = learned.propose(engine, len(rows), 3, 1, torch.zeros(()), SAMPLINGS[0])
            for i, row in enumerate(engine.live):
                t = row.length - 1  # the newest entry with a true feature
                if 0 <= t < int((owner == i).sum()):
                    assert torch.allclose(drafter.logits(trained[owner == i][t]), logits[i, 0], atol=1e-4), (i, t)
                    checked += 1
            made = [min(len(r.tokens), m + rng.randint(1, 5)) for r, m in zip(rows, made)]
        assert checked > 20


def test_training_pass_equals_inference_pass_and_a_shift_is_caught():
    check_alignment(pack)

    def shifted(rows):  # the classic bug: (x_t, h_t)
        return (torch.cat([x[:-2] for x, _, _ in rows])[None], *pack(rows)[1:])
    caught(check_alignment, shifted)


def check_packing(mask):
    model = tiny()
    drafter = make_drafter(model)
    rows = [(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses_of(model)[:5]]
    with torch.no_grad():
        run = lambda rows: [drafter(b[0], b[1], drafter.angles(b[3]), mask(b[4], b[3], 2, torch.float32))[0] for b in (pack(rows),)][0]
        assert torch.allclose(run(rows), torch.cat([run([row]) for row in rows]), atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    check_packing(drafter_module.block_mask)
    caught(check_packing, lambda owner, positions, groups, dtype: torch.full((len(owner),) * 2, -torch.inf).triu(1).repeat(groups, 1)[None, None])  # causal, no blocks
    caught(check_packing, lambda owner, positions, groups, dtype: torch.zeros(len(owner) * groups, len(owner))[None, None])  # not causal


def test_targets_are_the_next_feature_and_only_responses_count():
    x, h = torch.arange(10, 17), torch.arange(6.0)[:, None]
    ids, features, targets, positions, owner, counted = pack([(x, h, 3), (x, h, 1)])
    assert ids[0, :5].tolist() == [11, 12, 13, 14, 15] and features[0, :5, 0].tolist() == [0, 1, 2, 3, 4] and targets[0, :5, 0].tolist() == [1, 2, 3, 4, 5]
    assert positions[0].tolist() == [0, 1, 2, 3, 4] * 2 and owner.tolist() == [0] * 5 + [1] * 5
    assert counted.tolist() == [False, True, True, True, True] + [True] * 5  # entry t guesses token t + 2; tokens from 3 (or 1) on are the response


# ---------------------------------------------------------------- training


def check_policy_untouched(step):
    model = tiny()
    buffer, drafter = FeatureBuffer(), make_drafter(model)
    for r in responses_of(model):
        buffer.add(r)
    before, mine = {k: v.clone() for k, v in model.state_dict().items()}, {k: v.clone() for k, v in drafter.state_dict().items()}
    trainer = Trainer(drafter, tokens=128)
    for _ in range(3):
        step(trainer, buffer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(v, mine[k]) for k, v in drafter.state_dict().items())
    assert not {id(p) for p in drafter.parameters()} & {id(p) for p in model.parameters()}


def test_drafter_steps_leave_the_policy_bit_identical(monkeypatch):
    check_policy_untouched(Trainer.step)

    def careless(trainer, buffer):
        drafter_loss(trainer.drafter, buffer.pack(128, trainer.rng))[0].backward()  # gradients reach the borrowed head
        Trainer.step(trainer, buffer)
    caught(check_policy_untouched, careless)


def test_the_drafter_follows_the_live_policy_by_reference():
    model = tiny()
    drafter, h = make_drafter(model), torch.randn(1, 1, 32)
    before = drafter.logits(h)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.allclose(drafter.logits(h), 2 * before)


def test_training_raises_acceptance():
    model = tiny()
    assert accepted_per_round(model, trained_drafter(model)) > accepted_per_round(model, make_drafter(model)) + 0.1


def test_fit_reports_and_respects_its_time(model_folder):
    model = tiny()
    buffer, trainer = FeatureBuffer(), Trainer(make_drafter(model), tokens=64)
    for r in responses_of(model):
        buffer.add(r)
    loss, agreement = fit(trainer, buffer, 0.3, progress=False)
    assert trainer.steps > 0 and loss > 0 and 0 <= agreement <= 1


def test_buffer_is_bounded_by_bytes():
    buffer = FeatureBuffer(limit=10_000)
    for r in responses_of(tiny()) * 3:
        buffer.add(r)
        assert buffer.bytes == sum(h.nbytes for _, h, *_ in buffer.rows) and (buffer.bytes <= 10_000 or len(buffer.rows) == 1)


def check_remembers_the_tail(begin):
    """After a rollout of short and long responses and then one of short ones: this rollout's rows, and the longest of the last one's, with their numbers."""
    buffer = FeatureBuffer()
    for rollout, lengths in ((1, [90, 10, 30, 80]), (2, [5, 60, 7, 70]), (3, [4, 6])):
        begin(buffer, rollout)
        for n in lengths:
            buffer.add(Response(0, 0, [1], [2] * n, None, True, torch.zeros(n, 4)))
    assert [(row[3], len(row[0])) for row in buffer.rows] == [(2, 71), (3, 5), (3, 7)] and buffer.bytes == (70 + 4 + 6) * 16


def test_the_buffer_keeps_long_responses_of_the_last_rollout():
    check_remembers_the_tail(FeatureBuffer.begin)

    def forgetful(buffer, rollout):
        buffer.rows.clear()
        buffer.rollout, buffer.bytes = rollout, 0
    caught(check_remembers_the_tail, forgetful)
    caught(check_remembers_the_tail, lambda buffer, rollout: setattr(buffer, "rollout", rollout))  # keeps all


def test_what_is_published_is_the_running_average():
    model = tiny()
    buffer, trainer, served = FeatureBuffer(), Trainer(make_drafter(model), tokens=64), Drafter(model)
    for r in responses_of(model):
        buffer.add(r)
    seen = [[p.detach().clone() for p in trainer.drafter.parameters()]]
    mean = seen[0]
    for n in range(1, 6):
        trainer.step(buffer)
        keep = n / (n + 10)
        mean = [keep * m + (1 - keep) * p for m, p in zip(mean, trainer.drafter.parameters())]
    trainer.publish(served)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mean, served.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(served.parameters(), trainer.drafter.parameters()))


def test_a_float32_drafter_learns_beside_a_bfloat16_policy(tmp_path):
    """As on a GPU: the engine's policy and drafter in bfloat16, the learner and its average in float32."""
    model = tiny().bfloat16()
    learner, served = Drafter(model, torch.float32), Drafter(model)
    engine = Engine(model, {1}, 10, 100, drafters={"learned": LearnedDrafts(served)})
    buffer, trainer = FeatureBuffer(), Trainer(learner, tokens=64)
    for r in engine.generate(groups_of(4, random.Random(1)), SAMPLINGS[0], fixed("learned", 3)):
        buffer.add(r)
    before = learner.fc.weight.detach().clone()
    for _ in range(3):
        assert trainer.step(buffer)[0] > 0
    trainer.publish(served)
    assert {p.dtype for p in learner.parameters()} == {torch.float32} and not torch.equal(before, learner.fc.weight)
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16} and torch.allclose(served.fc.weight.float(), trainer.average[0], atol=1e-2)
    served.save(tmp_path)
    learner.load(tmp_path)
    list(engine.generate(groups_of(4, random.Random(2)), SAMPLINGS[0], fixed("learned", 3)))


def test_save_and_load(tmp_path):
    model = tiny()
    drafter = make_drafter(model)
    drafter.save(tmp_path)
    torch.manual_seed(9)
    other = Drafter(model)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), other.parameters()))
    with pytest.raises(UserError, match="drafter.safetensors"):
        Drafter(tiny(hidden_size=64)).load(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        other.load("nowhere")


@pytest.mark.parametrize("prompt", [3, 40, 290])
def test_of_long_rows_a_stretch_is_learned_that_holds_some_response(prompt, monkeypatch):
    monkeypatch.setattr(FeatureBuffer, "LONGEST", 50)
    buffer, rng, ids, hidden = FeatureBuffer(), random.Random(0), list(range(300)), torch.arange(299.0)[:, None].repeat(1, 4)
    buffer.add(Response(0, 0, ids[:prompt], ids[prompt:], None, True, hidden))
    for _ in range(50):
        x, features, targets, positions, owner, counted = buffer.pack(40, rng)
        assert x.shape[1] == 48 and counted.any() and torch.equal(x[0], features[0, :, 0].long() + 1) and torch.equal(targets, features + 1)
        assert torch.equal(counted, x[0] >= prompt - 1)  # entry t holds x_{t+1} and guesses x_{t+2}, which is of the response


# ---------------------------------------------------------------- n-grams


def test_ngrams_draft_what_followed_before_and_from_siblings():
    drafts, group = NGramDrafts(), Group(0, [5, 6], [1, 2])
    first, second = Row(group, 0, [10, 11, 12, 13, 14, 10, 11]), Row(group, 1, [13])
    engine = type("E", (), {"live": [first, second], "lens": torch.zeros(1)})()
    found, logits = drafts.propose(engine, 2, 3, 1, None, None)
    assert found[:, :, 0].tolist() == [[12, 13, 14], [14, 10, 11]] and logits is None
    other = Row(Group(1, [5, 7], [1]), 0, [10, 11])  # another prompt shares nothing
    engine.live = [other]
    assert drafts.propose(engine, 1, 2, 1, None, None)[0][:, :, 0].tolist() == [[0, 0]]


@cases(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(1, 6), max_size=8), st.integers(1, 6))
def test_ngrams_are_what_a_search_by_hand_finds(text, pieces, k):
    """However the text grows: what followed the newest occurrence of the longest suffix (4 tokens at most)."""
    drafts, row = NGramDrafts(), Row(Group(0, [9], [1]), 0, [])
    engine = type("E", (), {"live": [row], "lens": torch.zeros(1)})()
    for n in [*pieces, len(text)]:
        row.tokens += text[len(row.tokens):][:n]
        t = row.tokens
        ends = ([end for end in range(m, len(t)) if t[end - m:end] == t[-m:]] for m in range(min(4, len(t)), 0, -1))
        end = next((found[-1] for found in ends if found), len(t))
        wanted = t[end:end + k]
        assert drafts.propose(engine, 1, k, 1, None, None)[0][0, :, 0].tolist() == wanted + [0] * (k - len(wanted))


def test_ngrams_learn_a_loop():
    engine = make_engine(tiny())
    list(engine.generate(groups_of(12, random.Random(1)), SAMPLINGS[1], fixed("ngram", 4)))
    assert engine.stats["spec_tokens"] / engine.stats["spec_row_rounds"] > 1.2


def check_full_slots(engine_class):
    """Slots that the longest sequences fill to the last entry; speculation starts again after so many plain rounds that the catching up of
    a row would reach beyond the slot of another, which needs none."""
    model, groups = tiny(), groups_of(12, random.Random(1))
    longest = max(len(g.prompt) for g in groups)
    groups = [Group(g.index, g.prompt * (longest // len(g.prompt)), g.seeds) for g in groups]
    sampling, turns = Sampling(max_new=60), itertools.count()
    engine = engine_class(model, {999}, 10, max(len(g.prompt) for g in groups) + 60, drafters={"learned": LearnedDrafts(make_drafter(model))})
    plain = {(r.group, r.sample): r.tokens for r in engine.generate(groups, sampling)}
    spec = {(r.group, r.sample): r.tokens for r in engine.generate(groups, sampling, lambda live: Draft("learned", 12 if next(turns) % 40 > 35 else 0))}
    assert spec == plain


def test_catching_up_stays_inside_the_slots():
    check_full_slots(Engine)


def test_too_wide_a_draft_is_named():
    with pytest.raises(UserError, match="draft length 8 x width 3"):
        check_identity(fixed("learned", 8, 3))


def test_command_line_warm_starts(model_folder, tmp_path, monkeypatch, capsys):
    argv = ["drafter.py", "--model", str(model_folder), "--out", str(tmp_path), "--prompts", "2", "--seconds", "0.5", "--max-new", "20"]
    monkeypatch.setattr("sys.argv", argv)
    drafter_module.main()
    out = capsys.readouterr().out
    assert "before: " in out and "after: " in out and (tmp_path / "drafter.safetensors").exists()
    monkeypatch.setattr("sys.argv", [*argv, "--start", str(tmp_path)])
    drafter_module.main()
