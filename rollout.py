"""The rollout engine: many sequences through one Hugging Face causal LM, reproducible token by token, and speculative.

One round feeds every running sequence its newest token `cur` (whose keys and values are not in the cache yet) and k
draft tokens behind it, and samples the policy's own token at each:

    ids       = [cur, d1 .. dk]                                                      (B, T),  T = k + 1
    positions = lens[:, None] + arange(T)    where the new keys and values go        (B, T)
    mask      = arange(kv_len) <= positions  what they see; kv_len = max(lens) + T   (B, 1, T, kv_len)
    y         = argmax(logits / temperature + g)   g: the noise of sampling.py       (B, T)
    accepted  = (y[:, :k] == ids[:, 1:]).cumprod(1).sum(1)                           (B,)
    emit y[:, :accepted + 1];  lens += accepted + 1    THIS is the rollback: rejected entries are overwritten later

k = 0 is plain decoding: the same code.

Why this is lossless. Every emitted token is the policy's own sample, and its noise depends only on its sequence and
its place in it. So no drafter and no strategy can bias a token, and the same seed gives the same rollout with
speculation on or off, on 1 or 8 workers. Drafters sample with the SAME noise from THEIR logits: a drafter that knows
the policy's distribution predicts its sample, at any temperature. This rule and others (probability ratio, trees) are
in parts/engine/acceptance.py.

A round has four parts: `plan_round` (how far to draft, which shape), `run_round` (all work on the device: draft,
verify, accept, commit), `read_back` (the host waits for the device, once), `account` (tokens, statistics, strategy).

Continuous batching. Finished sequences leave at once: the last running one moves into the free slot, so that the
running sequences stay contiguous and a round pays for nothing else. Free slots are filled from an iterator of groups.
A group's prompt is prefilled once, by the policy and by the drafter, and its cache entries are copied to all samples.
Prompts are prefilled in parts of similar length, since a part is padded to its longest prompt.

Legend: B running sequences, T new tokens per sequence, k draft length, V vocabulary, D model width, G samples per
prompt. Left out: prefix sharing between prompts, prefill in chunks, beam search.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

import torch

from parts.cli import UserError
from parts.devices import free_memory, is_gpu, send
from parts.engine.acceptance import Coupled, Verification
from parts.engine.cuda_graphs import GraphPool, RoundShape, RoundTimer, bucketed_shape
from parts.engine.forward import fast_head, forward, head_of
from parts.engine.fused_layers import fuse_model
from parts.engine.interfaces import (
    MAX_DRAFT_LEN,
    DraftPlan,
    Group,
    Proposer,
    Response,
    RoundReport,
    RoundTrace,
    Sequence,
    Stats,
    Strategy,
)
from parts.engine.kv_cache import KVCache, TreeShape, sequences_that_fit, slot_bytes, zeros_when_touched
from parts.engine.model_loading import context_limit, too_long
from parts.engine.parity import matches_own_code
from parts.engine.sampling import Sampling, split_seeds

# ---------------------------------------------------------------- the queue

PREFILL_TOKENS = 4096  # of one forward: more is no faster, and takes more memory


class GroupQueue:
    """The groups that wait for free slots. Once a worker has pulled a group, no other worker can take it. So a group is
    pulled only if one as large as the last would fit: its own size is not known before.
    """

    def __init__(self, groups: Iterable[Group]):
        self.groups = iter(groups)
        self.waiting: Group | None = None  # pulled, but too large for the free slots
        self.last_size = 0

    def take(self, running: int, max_running: int) -> list[Group]:
        """Return the next groups that fit beside `running` sequences. If nothing is running, return at least one."""
        batch = []
        while not running or running + self.last_size <= max_running:
            group = self.waiting or next(self.groups, None)
            self.waiting = None
            if group is None:
                break
            self.last_size = len(group.seeds)
            if running and running + self.last_size > max_running:
                self.waiting = group
                break
            batch.append(group)
            running += self.last_size
        return batch


def prefill_parts(batch: list[Group], tokens: int) -> list[list[Group]]:
    """Return the groups by the length of their prompts, in parts that are prefilled in one forward each. A part has at
    most so many tokens, padding included, or a single longer prompt.
    """
    parts: list[list[Group]] = []
    for group in sorted(batch, key=lambda group: len(group.prompt)):
        if not parts or len(group.prompt) * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(group)
    return parts


# ---------------------------------------------------------------- the engine


class Engine:
    """Generates responses for groups.

    model           from model_loading.load_model
    stop_tokens     ids that end a response
    slots           sequences that run at once; fewer if they do not fit in GPU memory
    context         longest prompt + response, see `reserve`
    keep_hidden     give each Response its hidden states
    proposers       method -> Proposer, for speculation
    rule            how draft tokens are verified: a class of acceptance.py
    frozen          neither the model's nor the drafters' weights will change, so they are read once
    reserve_bytes   GPU memory to leave to others
    bucketed        run rounds in few shapes, so that CUDA graphs can replay them (cuda_graphs.py); None: only on a GPU

    `stats` describes the last `generate`. `max_running` may be lowered between rollouts: then a group that would
    exceed it waits.
    """

    cache: KVCache
    lens: torch.Tensor  # (slots,) valid cache entries of each sequence
    start: torch.Tensor  # (slots,) where its response begins
    seeds: torch.Tensor  # (slots, 2) int32, of its noise
    tokens: torch.Tensor  # (slots, max_len) x_t; the newest, `cur`, is at index lens
    logprobs: torch.Tensor  # (slots, max_len) of x_t
    hidden: torch.Tensor | None  # (slots, max_len, D) h_t, if they are kept
    running_count: torch.Tensor  # () how many sequences run, for rounds of a larger shape
    stop: torch.Tensor  # (V,) bool: tokens that end a response

    def __init__(
        self,
        model,
        stop_tokens: Iterable[int],
        slots: int = 64,
        context: int = 64,
        keep_hidden: bool = False,
        proposers: dict[str, Proposer] | None = None,
        rule: type[Coupled] = Coupled,
        frozen: bool = False,
        reserve_bytes: int = 0,
        bucketed: bool | None = None,
    ):
        on_gpu = is_gpu(model.device)
        self.model = model
        self.slots = self.slots_wanted = slots
        self.max_running = slots
        self.context = 0
        self.proposers = proposers or {}
        self.rule = rule
        self.frozen = frozen
        self.reserve_bytes = reserve_bytes
        self.keep_hidden = keep_hidden or any(p.needs_hidden for p in self.proposers.values())
        self.running: list[Sequence] = []  # sequence i is in slot i
        self.stats = Stats()
        self.fused_layers = fuse_model(model)
        if self.fused_layers and not matches_own_code(model, self.fused_layers)[0]:
            self.fused_layers = None
        self.head = head_of(model)
        self.max_logits = 1 << (25 if on_gpu else 21)  # most logits that exist at once
        self.bucketed = on_gpu if bucketed is None else bucketed
        self.graphs = GraphPool(self.compute_round) if on_gpu and self.bucketed else None
        self.timer = RoundTimer(model.device)
        self.weights_read = False
        self.stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.set_stop_tokens(stop_tokens)
        self.reserve(context)

    def set_stop_tokens(self, tokens: Iterable[int]) -> None:
        """From now on these tokens end a response. Call it between rollouts."""
        self.stop_set = set(tokens)
        self.stop.zero_()  # in place: recorded CUDA graphs read it at this address
        self.stop[[token for token in self.stop_set if 0 <= token < len(self.stop)]] = True

    # ---------------------------------------------------------------- memory

    def reserve(self, context: int) -> None:
        """Allocate for sequences of `context` tokens, prompt and response together. Call it between rollouts. Raises
        UserError.
        """
        limit = context_limit(self.model.config) or context
        if context > limit:
            raise UserError(too_long(context, limit))
        if context <= self.context:
            return
        self.context = context
        config, dtype, device = self.model.config, self.model.dtype, self.model.device
        max_len = context + MAX_DRAFT_LEN + 1  # rejected draft tokens may lie beyond the end
        max_len = -(-max_len // 8) * 8  # attention on a GPU wants mask lengths that are multiples of 8
        self.cache = self.tokens = self.logprobs = self.hidden = None  # free what was there
        slots = self.slots = self.max_running = self.affordable(max_len)
        self.cache = KVCache(config, slots, max_len, dtype, device)
        self.lens = torch.zeros(slots, dtype=torch.long, device=device)
        self.start = torch.zeros(slots, dtype=torch.long, device=device)
        self.seeds = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(slots, max_len, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, max_len, device=device)
        if self.keep_hidden:
            self.hidden = zeros_when_touched((slots, max_len, config.hidden_size), dtype, device)
        self.running_count = torch.zeros((), dtype=torch.long, device=device)
        for proposer in self.proposers.values():
            proposer.reserve(self, slots, max_len)
        if self.graphs:
            self.graphs.clear()

    def affordable(self, max_len: int) -> int:
        """Return the number of slots: as many as were asked for, or as many as fit in four fifths of the free GPU
        memory minus reserve_bytes.
        """
        free = free_memory(self.model.device)
        if free is None:
            return self.slots_wanted
        wanted = self.slots_wanted
        # in float32: logits, noise, their sum, the hash
        logits_bytes = 16 * min(self.max_logits, wanted * (MAX_DRAFT_LEN + 1) * self.model.config.vocab_size)
        return sequences_that_fit(wanted, max_len, self.slot_bytes(max_len), free - logits_bytes, self.reserve_bytes)

    def slot_bytes(self, max_len: int) -> int:
        """Return the memory that a slot of max_len tokens takes."""
        columns = MAX_DRAFT_LEN + 1
        return slot_bytes(self.model.config, max_len, columns, self.model.dtype, len(self.proposers), self.keep_hidden)

    # ---------------------------------------------------------------- a rollout

    @torch.inference_mode()
    def generate(
        self,
        groups: Iterable[Group],
        sampling: Sampling,
        strategy: Strategy | None = None,
        on_round: Callable[[RoundTrace], None] | None = None,
    ) -> Iterator[Response]:
        """Yield each Response as it finishes. groups: pulled one by one, as slots become free.

        strategy: how to draft each round; None: plain decoding. on_round is called for each running sequence after each
        round. Raises UserError for a group that does not fit.
        """
        read_by = list(self.proposers.values()) if strategy else []  # without a strategy nothing is drafted
        strategy = strategy or Strategy()
        queue = GroupQueue(self.checked(groups, sampling))
        started = time.perf_counter()
        self.running = []
        self.stats = Stats()
        self.read_weights()
        while True:
            batch = queue.take(len(self.running), self.max_running)
            for part in prefill_parts(batch, PREFILL_TOKENS):
                self.admit(part, read_by)
            if not self.running:
                break
            finished = self.round(sampling, strategy, on_round)
            for i in reversed(finished):  # from the back: the last sequence moves into the free slot
                yield self.remove(i)
        self.stats.seconds = time.perf_counter() - started

    def read_weights(self) -> None:
        """Refresh all copies of the model's weights."""
        if self.frozen and self.weights_read:
            return
        for layer in self.fused_layers or ():
            layer.read_weights()
        self.head = fast_head(self.model)
        self.weights_read = True
        moved = [proposer.load_weights() for proposer in self.proposers.values()]
        if self.graphs and any(moved):
            self.graphs.clear()

    def checked(self, groups: Iterable[Group], sampling: Sampling) -> Iterator[Group]:
        """Yield the same groups. Raises UserError for the first that cannot run."""
        for group in groups:
            begun = group.response_prefix_len
            tokens = len(group.prompt) - begun
            name = f"prompt {group.key}"
            if not group.prompt:
                raise UserError(f"{name} is empty: a policy needs at least one token to start from")
            if begun >= sampling.max_new:
                raise UserError(f"{name}: its {begun} first tokens leave nothing of max_new {sampling.max_new}")
            if tokens + sampling.max_new > self.context:
                limits = f"with max_new {sampling.max_new} it exceeds the context of {self.context}"
                raise UserError(f"{name} has {tokens} tokens; {limits}")
            if len(group.seeds) > self.slots:
                sizes = f"a group of {len(group.seeds)} samples does not fit {self.slots} slots"
                raise UserError(f"{sizes}: raise --slots, or lower --samples")
            yield group

    def admit(self, batch: list[Group], read_by: list[Proposer]) -> None:
        """Prefill prompt[:-1] of each group once, in the slots behind the running sequences, then copy the entries to
        its samples. cur = prompt[-1]. read_by: the proposers that read the prompts, too.
        """
        device = self.lens.device
        first = len(self.running)
        padded = [torch.tensor(g.prompt) for g in batch]
        prompts = send(torch.nn.utils.rnn.pad_sequence(padded, batch_first=True), device)  # (n, longest + 1)
        longest = prompts.shape[1] - 1
        if longest:
            slots = slice(first, first + len(batch))
            no_entries = torch.zeros(len(batch), dtype=torch.long, device=device)
            hidden = self.forward(slots, prompts[:, :-1], no_entries, longest)  # (n, longest, D)
            for proposer in read_by:
                proposer.read_prompts(slots, prompts, hidden)
        ends = [first]
        for group in batch:
            ends.append(ends[-1] + len(group.seeds))
            self.running += [Sequence(group, k) for k in range(len(group.seeds))]
        # group i is in slot first + i: from the back, nothing is overwritten before it is copied
        for i in reversed(range(len(batch))):
            slots = slice(ends[i], ends[i + 1])
            self.copy_entries(first + i, slots, len(batch[i].prompt) - 1)
            self.tokens[slots, : longest + 1] = prompts[i]
            if self.keep_hidden and longest:
                self.hidden[slots, :longest] = hidden[i]
        self.init_slots(slice(first, ends[-1]))

    def copy_entries(self, source: int, targets: slice, length: int) -> None:
        """Copy the first `length` cache entries of a slot to others, the policy's and the drafters'."""
        self.cache.copy(source, targets, length)
        for proposer in self.proposers.values():
            proposer.copy(source, targets, length)

    def init_slots(self, slots: slice) -> None:
        """Set lengths and seeds of new sequences, whose prompts are in the cache."""
        new = self.running[slots]
        lens = [sequence.length for sequence in new]
        starts = [sequence.length + 1 - sequence.group.response_prefix_len for sequence in new]
        seeds = [sequence.group.seeds[sequence.sample] for sequence in new]
        lens, starts, seeds = send(torch.tensor([lens, starts, seeds]), self.lens.device)
        self.lens[slots] = lens
        self.start[slots] = starts
        self.seeds[slots] = split_seeds(seeds)

    def forward(self, slots: slice, ids: torch.Tensor, lens: torch.Tensor, kv_len: int, tree: TreeShape | None = None):
        """Return the policy's hidden states (B, T, D) for new tokens ids (B, T)."""
        return forward(self.model, self.cache, slots, ids, lens, kv_len, tree, self.fused_layers)

    # ---------------------------------------------------------------- a round

    def round(self, sampling: Sampling, strategy: Strategy, on_round: Callable | None = None) -> list[int]:
        """Run one round for all running sequences -> the indices of those that are finished."""
        shape = self.plan_round(sampling, strategy)
        started = time.perf_counter()
        outcome = self.run_round(shape)
        accepted, new_tokens, drafts = self.read_back(outcome, shape.plan.k)
        finished = self.append_tokens(new_tokens, drafts, sampling, on_round)
        strategy.observe(self.account(shape.plan, accepted, new_tokens, time.perf_counter() - started))
        return finished

    def plan_round(self, sampling: Sampling, strategy: Strategy) -> RoundShape:
        """Decide everything about the next round that the host decides."""
        plan = strategy.choose(self.running)
        if not 0 <= plan.k <= MAX_DRAFT_LEN:
            raise UserError(f"draft length {plan.k}: 0 to {MAX_DRAFT_LEN} draft tokens fit a round")
        catch_up_len = self.proposers[plan.method].catch_up_len(self.running) if plan.k else 0
        kv_len = max(sequence.length for sequence in self.running) + plan.k + 1
        shape = RoundShape(len(self.running), kv_len, catch_up_len, plan, sampling)
        return bucketed_shape(shape, self.slots, self.tokens.shape[1]) if self.bucketed else shape

    def run_round(self, shape: RoundShape) -> torch.Tensor:
        """Run `compute_round`, replayed as a CUDA graph if possible."""
        plan = shape.plan
        if self.bucketed:
            self.running_count.fill_(len(self.running))
        needs_host = self.rule is not Coupled or (plan.k > 0 and self.proposers[plan.method].needs_host)
        outcome = self.graphs.run(shape, needs_host) if self.graphs else self.compute_round(shape)
        if plan.k:
            self.proposers[plan.method].caught_up(self.running)
        return outcome

    def compute_round(self, shape: RoundShape) -> torch.Tensor:
        """Run a round on the device -> (B, 2 + T + k): tokens emitted, draft tokens accepted, the policy's samples, the
        draft tokens.

        It reads `shape` and the engine's tensors, and nothing else of the host's, so that it can be recorded.
        """
        verification, index, drafts = self.draft_and_verify(shape)
        emitted = self.commit(verification, index, shape.sampling)
        return torch.cat([emitted[:, None], verification.accepted[:, None], verification.tokens, drafts], 1)

    def draft_and_verify(self, shape: RoundShape) -> tuple[Verification, torch.Tensor, torch.Tensor]:
        """Draft, verify, accept -> what the policy samples; index (B, T), the number of each sample in its response;
        the draft tokens (B, k).

        Nothing changes but cache entries beyond the sequences' ends: done twice, it is as if done once.
        """
        self.timer.round_begins()
        plan = shape.plan
        slots = slice(0, shape.batch_size)
        lens = self.lens[slots]
        columns = self.cache.numbers[: plan.k + 1]
        index = (lens + 1 - self.start[slots])[:, None] + columns
        rule = self.rule(shape.sampling, self.seeds[slots], index, self.model.config.vocab_size)
        ids = self.tokens[slots].gather(1, lens[:, None])  # (B, 1): cur
        drafts = ids[:, :0]
        tree = None
        if plan.k:
            drafts = self.proposers[plan.method].propose(self, shape, rule.draft_token)
            ids, tree = rule.verify_inputs(ids, drafts)
        self.timer.drafts_ready()
        kv_len = shape.kv_len + ids.shape[1] - len(columns)  # a tree has more columns
        hidden = self.forward(slots, ids, lens, kv_len, tree)  # (B, T, D)
        return rule.verify(self, ids, hidden), index, drafts

    def commit(self, verification: Verification, index: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Write a round's tokens, log-probabilities and features, and move the lengths -> tokens emitted (B,)."""
        n, columns = verification.tokens.shape
        slots = slice(0, n)
        steps = self.cache.numbers[:columns]
        # a stop token or the length limit may come inside the accepted run
        stops = self.stop[verification.tokens]
        before_stop = torch.where(stops, steps, columns).amin(1)
        emitted = torch.minimum(verification.accepted, before_stop) + 1
        emitted = torch.minimum(emitted, sampling.max_new - index[:, 0])
        if self.bucketed:  # slots beyond the running sequences stay as they are
            emitted = torch.where(self.cache.numbers[:n] < self.running_count, emitted, 0)
        # positions (B, k+1) of cur and the draft tokens; the sample made at a position is the token of the next one
        positions = self.lens[slots, None] + steps
        self.tokens[slots].scatter_(1, positions + 1, verification.tokens)
        self.logprobs[slots].scatter_(1, positions + 1, verification.logprobs)
        if self.keep_hidden:
            # not by scatter_: on a CPU its bfloat16 version takes time for every entry of `hidden`
            rows = self.cache.numbers[slots].unsqueeze(1)
            self.hidden[rows, positions] = verification.hidden
        self.lens[slots] += emitted
        return emitted

    def read_back(self, outcome: torch.Tensor, k: int) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Return, for each running sequence, the number of accepted draft tokens, the tokens emitted and the draft
        tokens. outcome: from `compute_round`. Here the host waits for the device, once a round.
        """
        host = outcome.tolist()[: len(self.running)]
        accepted = [line[1] for line in host]
        new_tokens = [line[2 : 2 + line[0]] for line in host]
        drafts = [line[len(line) - k :] for line in host]
        return accepted, new_tokens, drafts

    def append_tokens(self, new_tokens, drafts, sampling: Sampling, on_round: Callable | None) -> list[int]:
        """Append a round's tokens to the sequences -> the indices of those that are finished."""
        finished = []
        for i, (sequence, tokens) in enumerate(zip(self.running, new_tokens)):
            sequence.tokens += tokens
            sequence.rounds += 1
            sequence.draft_tokens += len(drafts[i])
            length = sequence.group.response_prefix_len + len(sequence.tokens)
            if tokens[-1] in self.stop_set or length >= sampling.max_new:
                finished.append(i)
            if on_round:
                on_round(RoundTrace(sequence, drafts[i] if self.rule is Coupled else [], tokens))
        return finished

    def account(self, plan: DraftPlan, accepted: list[int], new_tokens: list, seconds: float) -> RoundReport:
        """Add a round to `stats` -> its report for the strategy."""
        draft_seconds = self.timer.draft_seconds()
        lengths = [len(tokens) for tokens in new_tokens]
        tokens = sum(lengths)
        k = plan.k
        # draft tokens beyond the end of a response count neither as reached nor as accepted
        reached_by = sorted(min(k, n + 1, length) for n, length in zip(accepted, lengths))
        accepted_by = sorted(map(min, accepted, lengths))
        # by depth (from 1): the number of sequences that came so far
        reached = [len(reached_by) - bisect_left(reached_by, depth) for depth in range(1, k + 1)]
        accepted_at = [len(accepted_by) - bisect_left(accepted_by, depth) for depth in range(1, k + 1)]
        stats = self.stats
        stats.rounds += 1
        stats.tokens += tokens
        stats.draft_seconds += draft_seconds
        stats.verify_seconds += seconds - draft_seconds
        if k:
            stats.spec_rounds += 1
            stats.spec_sequence_rounds += len(accepted)
            stats.spec_tokens += tokens
            stats.spec_drafts += len(accepted) * k
        for depth in range(k):
            stats.drafted[depth] += reached[depth]
            stats.accepted[depth] += accepted_at[depth]
        warmup = self.graphs is not None and self.graphs.warmup
        return RoundReport(len(accepted), plan, seconds, reached, accepted_at, warmup)

    # ---------------------------------------------------------------- finished sequences

    def remove(self, i: int) -> Response:
        """Return the finished response in slot i; the last running sequence moves into the slot."""
        sequence = self.running[i]
        begin = len(sequence.group.prompt)
        end = sequence.length + 1
        response = Response(
            group=sequence.group.key,
            sample=sequence.sample,
            prompt=sequence.group.prompt,
            tokens=sequence.tokens,
            logprobs=self.logprobs[i, begin:end].cpu().clone(),
            stopped=sequence.tokens[-1] in self.stop_set,
            hidden=self.hidden[i, : end - 1].cpu().clone() if self.keep_hidden else None,
            problem=sequence.group.problem,
            rounds=sequence.rounds,
            draft_tokens=sequence.draft_tokens,
        )
        last = self.running.pop()
        if last is not sequence:
            self.running[i] = last
            self.move_slot(len(self.running), i, last.length + 1)
        return response

    def move_slot(self, source: int, target: int, length: int) -> None:
        """Move everything that is known of the sequence in slot `source` to slot `target`."""
        self.copy_entries(source, slice(target, target + 1), length)
        for per_slot in (self.lens, self.start, self.seeds):
            per_slot[target] = per_slot[source]
        for per_token in (self.tokens, self.logprobs, self.hidden):
            if per_token is not None:
                per_token[target, :length] = per_token[source, :length]
