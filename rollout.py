"""The rollout engine: many sequences through one Hugging Face causal LM, reproducible token by token, and speculative.

One round feeds every live row its newest token `cur` (not in the cache yet) and k drafts behind it, and samples the
policy's own token at each:

    ids      = [cur, d1 .. dk]                                                      (B, T),  T = k + 1
    slots    = lens[:, None] + arange(T)      where row b's new keys and values go  (B, T)
    mask     = arange(view) <= slots          what they see: view = max(lens) + T   (B, 1, T, view)
    y        = argmax(logits / temperature + g)   g: the noise of parts/sampling.py (B, T)
    accepted = (y[:, :k] == ids[:, 1:]).cumprod(1).sum(1)                           (B,)
    emit y[:, :accepted + 1];  lens += accepted + 1    THIS is the rollback: rejected slots are overwritten later

k = 0 is plain decoding: the same code.

Why nothing can go wrong. Every emitted token is the policy's own sample, and its noise belongs to its place in its
sequence. So no drafter and no strategy can bias a token, and the same seed gives the same rollout with speculation on
or off, on 1 or 8 workers. Drafters sample with the SAME noise on THEIR logits: a drafter that knows the policy's
distribution guesses its sample, at any temperature. Others (probability ratio, trees) are in parts/accept.py.

Continuous batching. Rows that end leave at once: the last live row moves into the hole, so the live rows stay
contiguous and a round costs what its live rows cost. Free slots are refilled from an iterator of groups; a group's
prompt is prefilled once, and its keys and values are copied to its samples.

Legend: B live rows, T new tokens per row, k draft length, V vocabulary, D model width, G samples per prompt.
Left out: prefix sharing between prompts, prefill in chunks, beam search.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import torch

from parts.common import UserError
from parts.interfaces import MAX_DRAFTS, Draft, Drafts, Group, Response, RoundReport, Row, Stats, Strategy
from parts.loading import agrees, too_long
from parts.memory import free_memory, rows_that_fit
from parts.modeling import SlotCache, Tree, fast_head, forward, fuse_model, head_of
from parts.sampling import Sampling, sample, sample_columns, seed_words, shared_noise

# ---------------------------------------------------------------- the accept rule


class Verdict(NamedTuple):
    """What the policy says of a round."""

    tokens: torch.Tensor  # (B, k+1) its own samples; the first accepted + 1 of a row count
    logprobs: torch.Tensor  # (B, k+1) of them
    hidden: torch.Tensor  # (B, k+1, D) its hidden states where they were sampled
    accepted: torch.Tensor  # (B,)


class Coupled:
    """The accept rule, made anew for each round: a draft is accepted if it is what the policy itself samples there."""

    def __init__(self, sampling: Sampling, seeds: torch.Tensor, index: torch.Tensor, vocab: int):
        """seeds (B, 2); index (B, k+1): which token of its response each column samples; vocab: V."""
        self.sampling = sampling
        self.seeds = seeds
        self.index = index
        self.vocab = vocab
        self.noise = shared_noise(sampling, seeds, index, vocab)  # (B, k+1, V), or None

    def guess(self, depth: int, logits: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        """The drafter's logits (B, 1, N) -> its guess (B, 1), drawn with the policy's own noise. words: as `sample`."""
        noise = self.noise[:, depth] if self.noise is not None and words is None else None
        y, _ = sample(logits[:, 0], self.sampling, self.seeds, self.index[:, depth], words, noise, scored=False)
        return y[:, None]

    def columns(self, cur: torch.Tensor, drafts: torch.Tensor) -> tuple[torch.Tensor, Tree | None]:
        """What the policy reads: cur (B, 1), drafts (B, k) -> ids (B, T), and their shape (None: a chain)."""
        return torch.cat([cur, drafts], 1), None

    def accept(self, engine: "Engine", ids: torch.Tensor, hidden: torch.Tensor) -> Verdict:
        """ids (B, T), hidden (B, T, D).

        The head over V words and the noise are dear, so columns go through them in pieces, and a row whose guess was
        wrong in one piece is left out of the next: what it would say there counts for nothing.
        """
        step = max(1, engine.logits_at_once // (len(ids) * self.vocab))
        if step >= ids.shape[1]:
            tokens, logprobs = sample_columns(engine.head(hidden), self.sampling, self.seeds, self.index, self.noise)
        else:
            tokens, logprobs = self.sample_in_pieces(engine, ids, hidden, step)
        accepted = (tokens[:, :-1] == ids[:, 1:]).long().cumprod(1).sum(1)
        return Verdict(tokens, logprobs, hidden, accepted)

    def sample_in_pieces(self, engine: "Engine", ids, hidden, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`step` columns at a time -> tokens and log-probabilities (B, T), 0 where a row has dropped out."""
        tokens = torch.zeros_like(ids)
        logprobs = torch.zeros(ids.shape, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        for first in range(0, ids.shape[1], step):
            part = slice(first, first + step)
            logits = engine.head(hidden[rows, part])
            y, logp = sample_columns(logits, self.sampling, self.seeds[rows], self.index[rows, part])
            tokens[rows, part] = y
            logprobs[rows, part] = logp
            drafts = ids[rows, 1 + first : 1 + first + step]  # one shorter in the last piece
            rows = rows[(y[:, : drafts.shape[1]] == drafts).all(1)]
            if not len(rows):
                break
        return tokens, logprobs


# ---------------------------------------------------------------- the engine


class GroupQueue:
    """The groups that wait. One is drawn only when it would fit if it were as large as the last: what waits here,
    no other worker can have.
    """

    def __init__(self, groups: Iterable[Group]):
        self.groups = iter(groups)
        self.waiting: Group | None = None  # drawn, and too large for what was free
        self.last_size = 0

    def take(self, live: int, row_limit: int) -> list[Group]:
        """The next groups that fit beside `live` rows. Where nothing lives, one comes in any case."""
        batch = []
        while not live or live + self.last_size <= row_limit:
            group = self.waiting or next(self.groups, None)
            self.waiting = None
            if group is None:
                break
            self.last_size = len(group.seeds)
            if live and live + self.last_size > row_limit:
                self.waiting = group
                break
            batch.append(group)
            live += self.last_size
        return batch


class Engine:
    """Generates responses for groups.

    model           from loading.load_model
    stop_tokens     ids that end a response
    slots           rows that run at once; fewer if the memory of a GPU does not hold them
    context         longest prompt + response, see `reserve`
    keep_hidden     give each Response its hidden states
    drafters        name -> Drafts, for speculation
    rule            how drafts are verified: Coupled, or one of parts/accept.py
    frozen          neither the model's nor the drafters' weights will change, so they are read once
    reserve_bytes   GPU memory to leave to others

    stats tells of the last `generate`; row_limit may be lowered between rollouts: a group that would make more rows
    waits.
    """

    cache: SlotCache
    lens: torch.Tensor  # (slots,) valid cache entries of each row
    start: torch.Tensor  # (slots,) where its response begins
    seeds: torch.Tensor  # (slots, 2) int32, of its noise
    tokens: torch.Tensor  # (slots, room) x_t; the newest, `cur`, stands at lens
    logprobs: torch.Tensor  # (slots, room) of x_t
    hidden: torch.Tensor | None  # (slots, room, D) h_t, if they are kept

    def __init__(
        self,
        model,
        stop_tokens: Iterable[int],
        slots: int = 64,
        context: int = 64,
        keep_hidden: bool = False,
        drafters: dict[str, Drafts] | None = None,
        rule: type[Coupled] = Coupled,
        frozen: bool = False,
        reserve_bytes: int = 0,
    ):
        self.model = model
        self.slots = self.slots_wanted = slots
        self.row_limit = slots
        self.context = 0
        self.drafters = drafters or {}
        self.rule = rule
        self.frozen = frozen
        self.reserve_bytes = reserve_bytes
        self.keep_hidden = keep_hidden or any(d.needs_hidden for d in self.drafters.values())
        self.live: list[Row] = []
        self.stats = Stats()
        self.fused_layers = fuse_model(model)
        self.fusable = self.fused_layers is not None and agrees(model, self.fused_layers)[0]
        self.head = head_of(model)
        self.logits_at_once = 1 << (21 if model.device.type == "cpu" else 25)
        self.weights_read = False
        self.stop_at(stop_tokens)
        self.reserve(context)

    def stop_at(self, tokens: Iterable[int]) -> None:
        """From now on these tokens end a response. Call it between rollouts."""
        self.stop_set = set(tokens)
        self.stop = torch.tensor(sorted(self.stop_set), device=self.model.device)

    def reserve(self, context: int) -> None:
        """Make room for sequences of `context` tokens, prompt and response together, between rollouts. Raises
        UserError.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None) or context
        if context > limit:
            raise UserError(too_long(context, limit))
        if context <= self.context:
            return
        self.context = context
        config, dtype, device = self.model.config, self.model.dtype, self.model.device
        room = context + MAX_DRAFTS + 1  # rejected drafts may stand beyond the end
        self.cache = self.tokens = self.logprobs = self.hidden = None  # what was there makes room
        slots = self.slots = self.row_limit = self.affordable(room)
        self.cache = SlotCache(config, slots, room, dtype, device)
        self.lens = torch.zeros(slots, dtype=torch.long, device=device)
        self.start = torch.zeros(slots, dtype=torch.long, device=device)
        self.seeds = torch.zeros(slots, 2, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(slots, room, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, room, device=device)
        if self.keep_hidden:
            self.hidden = torch.zeros(slots, room, config.hidden_size, dtype=dtype, device=device)
        for drafter in self.drafters.values():
            drafter.reserve(self, slots, room)

    def affordable(self, room: int) -> int:
        """As many slots as asked for, or as four fifths of the free GPU memory, less reserve_bytes, hold."""
        free = free_memory(self.model.device)
        if free is None:
            return self.slots_wanted
        config, dtype = self.model.config, self.model.dtype
        row_bytes = SlotCache(config, 1, room, dtype, "meta", config.num_hidden_layers + len(self.drafters)).data.nbytes
        row_bytes += self.keep_hidden * room * config.hidden_size * dtype.itemsize
        # in float32: logits, noise, sum, hash
        logits_bytes = 16 * min(self.logits_at_once, self.slots_wanted * (MAX_DRAFTS + 1) * config.vocab_size)
        return rows_that_fit(self.slots_wanted, room, row_bytes, free - logits_bytes, self.reserve_bytes)

    @torch.inference_mode()
    def generate(
        self,
        groups: Iterable[Group],
        sampling: Sampling,
        strategy: Strategy | None = None,
        on_token: Callable[[Hashable, int, int], None] | None = None,
    ) -> Iterator[Response]:
        """Yields a Response as each one ends. groups: asked for the next one only when its rows fit.

        strategy: how to draft each round; None: plain decoding. on_token(group key, sample, token) hears every token as
        it is made. Raises UserError for a group that does not fit.
        """
        strategy = strategy or Strategy()
        queue = GroupQueue(self.checked(groups, sampling))
        started = time.perf_counter()
        self.live = []
        self.stats = Stats()
        self.read_weights()
        while True:
            batch = queue.take(len(self.live), self.row_limit)
            if batch:
                self.admit(batch)
            if not self.live:
                break
            ended = self.round(sampling, strategy, on_token)
            for i in reversed(ended):  # from the back: the last row fills the hole
                yield self.take(i)
        self.stats.seconds = time.perf_counter() - started

    def read_weights(self) -> None:
        """Copies of weights are made anew, as they are now."""
        if self.frozen and self.weights_read:
            return
        self.fused_layers = fuse_model(self.model) if self.fusable else None
        self.head = fast_head(self.model)
        self.weights_read = True
        for drafter in self.drafters.values():
            drafter.begin()

    def checked(self, groups: Iterable[Group], sampling: Sampling) -> Iterator[Group]:
        """The same groups. Raises UserError for the first that cannot run."""
        for group in groups:
            tokens = len(group.prompt) - group.begun
            name = f"prompt {group.key}"
            if not group.prompt:
                raise UserError(f"{name} is empty: a policy needs at least one token to start from")
            if group.begun >= sampling.max_new:
                raise UserError(f"{name}: its {group.begun} first tokens leave nothing of max_new {sampling.max_new}")
            if tokens + sampling.max_new > self.context:
                limits = f"with max_new {sampling.max_new} it exceeds the context of {self.context}"
                raise UserError(f"{name} has {tokens} tokens; {limits}")
            if len(group.seeds) > self.slots:
                sizes = f"a group of {len(group.seeds)} samples does not fit {self.slots} slots"
                raise UserError(f"{sizes}: raise --slots, or lower --samples")
            yield group

    def admit(self, batch: list[Group]) -> None:
        """Prefill prompt[:-1] of each group once, in the rows behind the live ones, then give every sample its copy.

        cur = prompt[-1].
        """
        device = self.lens.device
        first = len(self.live)
        padded = [torch.tensor(g.prompt) for g in batch]
        prompts = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device)  # (n, longest + 1)
        longest = prompts.shape[1] - 1
        if longest:
            rows = slice(first, first + len(batch))
            none_yet = torch.zeros(len(batch), dtype=torch.long, device=device)
            hidden = self.forward(rows, prompts[:, :-1], none_yet, longest)
        ends = [first]
        for group in batch:
            ends.append(ends[-1] + len(group.seeds))
            self.live += [Row(group, k) for k in range(len(group.seeds))]
        # group i sits in row first + i: from the back, nothing is overwritten early
        for i in reversed(range(len(batch))):
            rows = slice(ends[i], ends[i + 1])
            self.cache.move(first + i, rows, len(batch[i].prompt) - 1)
            self.tokens[rows, : longest + 1] = prompts[i]
            if self.keep_hidden and longest:
                self.hidden[rows, :longest] = hidden[i]
        self.set_up_rows(slice(first, ends[-1]))

    def set_up_rows(self, rows: slice) -> None:
        """Lengths and seeds of new rows, whose prompts are in the cache."""
        new = self.live[rows]
        device = self.lens.device
        self.lens[rows] = torch.tensor([row.length for row in new], device=device)
        self.start[rows] = self.lens[rows] + 1 - torch.tensor([row.group.begun for row in new], device=device)
        self.seeds[rows] = seed_words(torch.tensor([row.group.seeds[row.sample] for row in new], device=device))
        for drafter in self.drafters.values():
            drafter.admit(rows)

    def forward(self, rows: slice, ids: torch.Tensor, lens: torch.Tensor, view: int, tree: Tree | None = None):
        """Hidden states (B, T, D) of the policy for new tokens ids (B, T)."""
        return forward(self.model, self.cache, rows, ids, lens, view, tree, self.fused_layers)

    def round(self, sampling: Sampling, strategy: Strategy, on_token: Callable | None = None) -> list[int]:
        """Draft, verify, accept, commit, tell, for all live rows -> the rows that ended."""
        draft = strategy.choose(self.live)
        if not 0 <= draft.k <= MAX_DRAFTS:
            raise UserError(f"draft length {draft.k}: 0 to {MAX_DRAFTS} drafts fit a round")
        started = time.perf_counter()
        rows = slice(0, len(self.live))
        lens = self.lens[rows]
        columns = torch.arange(draft.k + 1, device=lens.device)
        index = (lens + 1 - self.start[rows])[:, None] + columns  # which token of its response each column samples
        rule = self.rule(sampling, self.seeds[rows], index, self.model.config.vocab_size)
        ids = self.tokens[rows].gather(1, lens[:, None])  # (B, 1): cur
        tree = None
        if draft.k:
            drafts = self.drafters[draft.kind].propose(self, draft.k, rule.guess)
            ids, tree = rule.columns(ids, drafts)
        drafted = time.perf_counter()
        view = max(row.length for row in self.live) + ids.shape[1]
        hidden = self.forward(rows, ids, lens, view, tree)  # (B, T, D)
        verdict = rule.accept(self, ids, hidden)
        emitted = self.commit(verdict, index, sampling)
        accepted, new_tokens = self.to_host(verdict, emitted)
        ended = self.extend_rows(new_tokens, sampling, ids.shape[1] - 1, on_token)
        strategy.observe(self.tell(draft, accepted, sum(map(len, new_tokens)), started, drafted))
        return ended

    def commit(self, verdict: Verdict, index: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Write a round's tokens, log-probabilities and features, and move the lengths -> tokens emitted (B,)."""
        n, columns = verdict.tokens.shape
        rows = slice(0, n)
        steps = torch.arange(columns, device=self.lens.device)
        # a stop token or the length limit may come inside the accepted run
        before_stop = torch.where(torch.isin(verdict.tokens, self.stop), steps, columns).amin(1)
        emitted = torch.minimum(verdict.accepted, before_stop) + 1
        emitted = torch.minimum(emitted, sampling.max_new - index[:, 0])
        # (B, k+1), of cur and the drafts; the sample of a place stands one later
        places = self.lens[rows, None] + steps
        self.tokens[rows].scatter_(1, places + 1, verdict.tokens)
        self.logprobs[rows].scatter_(1, places + 1, verdict.logprobs)
        if self.keep_hidden:
            self.hidden[rows].scatter_(1, places[..., None].expand_as(verdict.hidden), verdict.hidden)
        self.lens[rows] += emitted
        return emitted

    def to_host(self, verdict: Verdict, emitted: torch.Tensor) -> tuple[list[int], list[list[int]]]:
        """(drafts accepted, tokens emitted) of each row. The round's one wait for the device."""
        host = torch.cat([emitted[:, None], verdict.accepted[:, None], verdict.tokens], 1).tolist()
        return [line[1] for line in host], [line[2 : 2 + line[0]] for line in host]

    def extend_rows(self, new_tokens: list[list[int]], sampling: Sampling, drafts: int, on_token) -> list[int]:
        """Give the rows their new tokens -> the rows that ended."""
        ended = []
        for i, (row, tokens) in enumerate(zip(self.live, new_tokens)):
            row.tokens += tokens
            row.rounds += 1
            row.drafts += drafts
            if tokens[-1] in self.stop_set or row.group.begun + len(row.tokens) >= sampling.max_new:
                ended.append(i)
            if on_token:
                for token in tokens:
                    on_token(row.group.key, row.sample, token)
        return ended

    def tell(self, draft: Draft, accepted: list[int], tokens: int, started: float, drafted: float) -> RoundReport:
        """Count a round in `stats` -> its report for the strategy."""
        now = time.perf_counter()
        k = draft.k
        ordered = sorted(accepted)
        # by depth: rows with so many right guesses or more
        reached = [len(ordered) - bisect_left(ordered, depth) for depth in range(k + 1)]
        stats = self.stats
        stats.rounds += 1
        stats.tokens += tokens
        stats.draft_seconds += drafted - started
        stats.verify_seconds += now - drafted
        if k:
            stats.spec_rounds += 1
            stats.spec_row_rounds += len(accepted)
            stats.spec_tokens += tokens
            stats.spec_drafts += len(accepted) * k
        for depth in range(k):
            stats.drafted[depth] += reached[depth]
            stats.accepted[depth] += reached[depth + 1]
        return RoundReport(len(accepted), draft, now - started, reached[:k], reached[1:])

    def take(self, i: int) -> Response:
        """The finished response in row i; the last live row moves into its slot."""
        row = self.live[i]
        begin = len(row.group.prompt)
        end = row.length + 1
        response = Response(
            group=row.group.key,
            sample=row.sample,
            prompt=row.group.prompt,
            tokens=row.tokens,
            logprobs=self.logprobs[i, begin:end].cpu().clone(),
            stopped=row.tokens[-1] in self.stop_set,
            hidden=self.hidden[i, : end - 1].cpu().clone() if self.keep_hidden else None,
            rounds=row.rounds,
            drafts=row.drafts,
        )
        last = self.live.pop()
        if last is not row:
            self.live[i] = last
            self.move_row(len(self.live), i, last.length + 1)
        return response

    def move_row(self, source: int, target: int, length: int) -> None:
        """All that is known of the row in slot `source` goes to slot `target`."""
        self.cache.move(source, slice(target, target + 1), length)
        for per_row in (self.lens, self.start, self.seeds):
            per_row[target] = per_row[source]
        for per_token in (self.tokens, self.logprobs, self.hidden):
            if per_token is not None:
                per_token[target, :length] = per_token[source, :length]
        for drafter in self.drafters.values():
            drafter.move(source, target)
