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
distribution guesses its sample, at any temperature. This rule and others (probability ratio, trees) are in
parts/accept.py.

Continuous batching. Rows that end leave at once: the last live row moves into the hole, so the live rows stay
contiguous and a round costs what its live rows cost. Free slots are refilled from an iterator of groups; a group's
prompt is prefilled once, and its keys and values are copied to its samples.

Legend: B live rows, T new tokens per row, k draft length, V vocabulary, D model width, G samples per prompt.
Left out: prefix sharing between prompts, prefill in chunks, beam search.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch

from parts.cli import UserError
from parts.devices import free_memory
from parts.engine.acceptance import Coupled, Verdict
from parts.engine.cuda_graphs import Graphs, Marks, Shape, rounded
from parts.engine.forward import fast_head, forward, head_of
from parts.engine.fused_layers import fuse_model
from parts.engine.interfaces import MAX_DRAFTS, Draft, Drafts, Group, Response, RoundReport, Row, Stats, Strategy
from parts.engine.kv_cache import SlotCache, Tree, rows_that_fit
from parts.engine.model_loading import too_long
from parts.engine.parity import agrees
from parts.engine.sampling import Sampling, seed_words

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
    rule            how drafts are verified: a class of parts/accept.py
    frozen          neither the model's nor the drafters' weights will change, so they are read once
    reserve_bytes   GPU memory to leave to others
    bucketed        rounds in few sizes, so that a GPU can replay them (parts/graphs.py); None: on a GPU

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
    live_count: torch.Tensor  # () how many rows live, for rounds of more rows
    stop: torch.Tensor  # (V,) bool: tokens that end a response

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
        bucketed: bool | None = None,
    ):
        on_gpu = model.device.type == "cuda"
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
        if self.fused_layers and not agrees(model, self.fused_layers)[0]:
            self.fused_layers = None
        self.head = head_of(model)
        self.logits_at_once = 1 << (25 if on_gpu else 21)
        self.bucketed = on_gpu if bucketed is None else bucketed
        self.graphs = Graphs(self.compute) if on_gpu and self.bucketed else None
        self.marks = Marks(model.device)
        self.weights_read = False
        self.stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.stop_at(stop_tokens)
        self.reserve(context)

    def stop_at(self, tokens: Iterable[int]) -> None:
        """From now on these tokens end a response. Call it between rollouts."""
        self.stop_set = set(tokens)
        self.stop.zero_()  # in place: recorded rounds look there
        self.stop[[token for token in self.stop_set if 0 <= token < len(self.stop)]] = True

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
        room = -(-room // 8) * 8  # a GPU's attention wants masks of such a length, and copies others for every layer
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
        self.live_count = torch.zeros((), dtype=torch.long, device=device)
        for drafter in self.drafters.values():
            drafter.reserve(self, slots, room)
        if self.graphs:
            self.graphs.forget()  # they knew where everything was

    def affordable(self, room: int) -> int:
        """As many slots as asked for, or as four fifths of the free GPU memory, less reserve_bytes, hold."""
        free = free_memory(self.model.device)
        if free is None:
            return self.slots_wanted
        wanted = self.slots_wanted
        # in float32: logits, noise, sum, hash
        logits_bytes = 16 * min(self.logits_at_once, wanted * (MAX_DRAFTS + 1) * self.model.config.vocab_size)
        return rows_that_fit(wanted, room, self.row_bytes(room), free - logits_bytes, self.reserve_bytes)

    def row_bytes(self, room: int) -> int:
        """Memory of a slot of so many tokens."""
        config, dtype = self.model.config, self.model.dtype
        layers = config.num_hidden_layers + len(self.drafters)
        cache = SlotCache(config, 1, room, dtype, "meta", layers).data.nbytes
        return cache + self.keep_hidden * room * config.hidden_size * dtype.itemsize

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
        """Copies of weights are filled anew, with the weights as they are now."""
        if self.frozen and self.weights_read:
            return
        for layer in self.fused_layers or ():
            layer.read()
        self.head = fast_head(self.model)
        self.weights_read = True
        moved = [drafter.begin() for drafter in self.drafters.values()]
        if self.graphs and any(moved):
            self.graphs.forget()

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
        shape = self.shape_of(draft, sampling)
        if self.bucketed:
            self.live_count.fill_(len(self.live))
        asks_host = self.rule is not Coupled or (draft.k and self.drafters[draft.kind].asks_host)
        graphs = None if asks_host else self.graphs
        outcome = graphs.run(shape) if graphs else self.compute(shape)
        accepted, new_tokens = self.to_host(outcome)
        ended = self.extend_rows(new_tokens, sampling, outcome.shape[1] - 3, on_token)
        report = self.tell(draft, accepted, sum(map(len, new_tokens)), started)
        strategy.observe(report._replace(first=graphs is not None and graphs.first))
        return ended

    def shape_of(self, draft: Draft, sampling: Sampling) -> Shape:
        """All that the host decides about the next round."""
        gap = self.drafters[draft.kind].missing(self.live) if draft.k else 0
        view = max(row.length for row in self.live) + draft.k + 1
        shape = Shape(len(self.live), view, gap, draft, sampling)
        return rounded(shape, self.slots, self.tokens.shape[1]) if self.bucketed else shape

    def compute(self, shape: Shape) -> torch.Tensor:
        """A round on the device -> (rows, 2 + T): tokens emitted, drafts accepted, the policy's samples.

        It reads `shape` and the buffers, nothing else of the host's: so it can be recorded, and replayed.
        """
        verdict, index = self.guess_and_check(shape)
        emitted = self.commit(verdict, index, shape.sampling)
        return torch.cat([emitted[:, None], verdict.accepted[:, None], verdict.tokens], 1)

    def guess_and_check(self, shape: Shape) -> tuple[Verdict, torch.Tensor]:
        """Draft, verify, accept -> what the policy says, and index (B, T): which token of its response each sample is.

        Nothing changes but cache entries beyond the rows' ends: done twice, it is as if done once.
        """
        self.marks.set(0)
        draft = shape.draft
        rows = slice(0, shape.rows)
        lens = self.lens[rows]
        columns = self.cache.numbers[: draft.k + 1]
        index = (lens + 1 - self.start[rows])[:, None] + columns
        rule = self.rule(shape.sampling, self.seeds[rows], index, self.model.config.vocab_size)
        ids = self.tokens[rows].gather(1, lens[:, None])  # (B, 1): cur
        tree = None
        if draft.k:
            drafts = self.drafters[draft.kind].propose(self, shape, rule.guess)
            ids, tree = rule.columns(ids, drafts)
        self.marks.set(1)
        view = shape.view + ids.shape[1] - len(columns)  # a tree has more columns
        hidden = self.forward(rows, ids, lens, view, tree)  # (B, T, D)
        return rule.accept(self, ids, hidden), index

    def commit(self, verdict: Verdict, index: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Write a round's tokens, log-probabilities and features, and move the lengths -> tokens emitted (B,)."""
        n, columns = verdict.tokens.shape
        rows = slice(0, n)
        steps = self.cache.numbers[:columns]
        # a stop token or the length limit may come inside the accepted run
        stops = self.stop[verdict.tokens]
        before_stop = torch.where(stops, steps, columns).amin(1)
        emitted = torch.minimum(verdict.accepted, before_stop) + 1
        emitted = torch.minimum(emitted, sampling.max_new - index[:, 0])
        if self.bucketed:  # the rows beyond the live ones stay as they are
            emitted = torch.where(self.cache.numbers[:n] < self.live_count, emitted, 0)
        # (B, k+1), of cur and the drafts; the sample of a place stands one later
        places = self.lens[rows, None] + steps
        self.tokens[rows].scatter_(1, places + 1, verdict.tokens)
        self.logprobs[rows].scatter_(1, places + 1, verdict.logprobs)
        if self.keep_hidden:
            self.hidden[rows].scatter_(1, places[..., None].expand_as(verdict.hidden), verdict.hidden)
        self.lens[rows] += emitted
        return emitted

    def to_host(self, outcome: torch.Tensor) -> tuple[list[int], list[list[int]]]:
        """outcome: of `compute` -> (drafts accepted, tokens emitted) of each live row. The round's one wait for the
        device.
        """
        host = outcome.tolist()[: len(self.live)]
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

    def tell(self, draft: Draft, accepted: list[int], tokens: int, started: float) -> RoundReport:
        """Count a round in `stats` -> its report for the strategy."""
        seconds = time.perf_counter() - started
        draft_seconds = self.marks.seconds()
        k = draft.k
        ordered = sorted(accepted)
        # by depth: rows with so many right guesses or more
        reached = [len(ordered) - bisect_left(ordered, depth) for depth in range(k + 1)]
        stats = self.stats
        stats.rounds += 1
        stats.tokens += tokens
        stats.draft_seconds += draft_seconds
        stats.verify_seconds += seconds - draft_seconds
        if k:
            stats.spec_rounds += 1
            stats.spec_row_rounds += len(accepted)
            stats.spec_tokens += tokens
            stats.spec_drafts += len(accepted) * k
        for depth in range(k):
            stats.drafted[depth] += reached[depth]
            stats.accepted[depth] += reached[depth + 1]
        return RoundReport(len(accepted), draft, seconds, reached[:k], reached[1:])

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
