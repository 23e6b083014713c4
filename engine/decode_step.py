"""One decode step of all slots, from and to tensors that stay where they are."""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.engine.cache_plan import CachePlan
from argrpo.engine.paged_cache import PagedAttend, PagedCache
from argrpo.engine.policy import Policy, rotary_rows
from argrpo.kernels.draw import DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import guided_sample
from argrpo.kernels.record_draw import DrawLog, FedEmbeddings, StepInputs, record_draw_


class StepVariant(NamedTuple):
    """What a captured step has baked in; all else it reads on the device."""

    num_branches: int  # 2 with guidance
    is_filtered: bool
    wants_cond_logprobs: bool
    wants_support: bool


class DecodeState:
    """What a step reads and writes; R rows for the slots, twice for the two branches."""

    def __init__(self, policy: Policy, plan: CachePlan) -> None:
        shape, weight = policy.shape, policy.head_weight
        device, num_rows, num_tokens = weight.device, plan.num_rows, shape.num_image_tokens
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.first_entry = plan.layout.first_entry
        self.is_collapsed = self.first_entry == 0
        self.cache = PagedCache(
            shape,
            num_pages=plan.num_pages,
            page_size=plan.layout.page_size,
            num_rows=2 * num_rows,
            pages_per_row=plan.layout.pages_per_row,
            device=device,
            dtype=weight.dtype,
        )
        # Collapsed prefixes take no entries, so entry t belongs to image token t.
        self.rotary = rotary_rows(policy, slice(shape.prefix_len - self.first_entry, None))
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.image_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.scalars = torch.ones(4, device=device)
        self._inputs = StepInputs(
            torch.zeros(2, num_rows, weight.shape[1], dtype=weight.dtype, device=device),
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(2, num_rows, dtype=torch.int64, device=device),
        )
        self._logprobs = torch.zeros(3, num_rows, num_tokens, device=device)
        self._token_ids = torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device)
        self._support: Tensor | None = None
        self._support_bytes = -(-shape.vocab_size // 8)
        self.idle()

    def idle(self) -> None:
        """Nobody is drawn: a step logs nothing and stores no keys."""
        self._inputs.positions.fill_(self.num_tokens)
        self._inputs.entries.fill_(-1)

    def rest(self, slots: slice) -> None:
        """These slots are idle: steps of either number of branches store no keys for them."""
        self._inputs.positions[slots] = self.num_tokens
        self._inputs.entries[:, slots] = -1

    def take_support(self) -> None:
        """Room for kept sets, the largest part of the log: taken once somebody wants them."""
        if self._support is None:
            size = (self.num_rows, self.num_tokens, self._support_bytes)
            self._support = torch.zeros(size, dtype=torch.uint8, device=self.seed.device)

    def inputs(self, num_branches: int) -> StepInputs:
        """Those of the first branches."""
        x, positions, entries = self._inputs
        return StepInputs(x[:num_branches], positions, entries[:num_branches])

    def log(self, variant: StepVariant) -> DrawLog:
        """What a step of this kind fills."""
        assert self._support is not None or not variant.wants_support, "take_support comes first"
        logprobs, entropies, cond_logprobs = self._logprobs
        return DrawLog(
            self._token_ids,
            logprobs,
            entropies,
            cond_logprobs if variant.wants_cond_logprobs else None,
            self._support if variant.wants_support else None,
        )


def fed_embeddings(policy: Policy) -> FedEmbeddings:
    """What the tokens of a step become, read in place."""
    return FedEmbeddings(policy.token_embedding.weight, policy.image_places)


def decode_steps(policy: Policy, state: DecodeState, variant: StepVariant, num_steps: int) -> None:
    """Draw the next tokens of every slot that is not idle; both branches are fed the same token."""
    inputs, log = state.inputs(variant.num_branches), state.log(variant)
    keys = DrawKeys(state.seed, state.image_ids, inputs.positions)
    attend = PagedAttend(
        state.cache, inputs.entries.flatten(), state.rotary, collapsed=state.is_collapsed
    )
    for _ in range(num_steps):
        hidden = policy.trunk(inputs.x.flatten(0, 1)[:, None], attend)[:, 0]
        branches = hidden.split(state.num_rows)
        draw = guided_sample(
            branches[0],
            branches[1] if variant.num_branches == 2 else None,
            policy.head_weight,
            keys,
            DrawSettings(state.scalars, variant.is_filtered),
            cond_logprobs=variant.wants_cond_logprobs,
            support=variant.wants_support,
        )
        record_draw_(draw, fed_embeddings(policy), inputs, log, state.first_entry)
