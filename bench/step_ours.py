"""argrpo's training step, from the parts that `Trainer` calls, in its order."""

import torch
from step_case import Judges, StepCase
from torch import Tensor

from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.head_gradients import backward
from argrpo.learner import Learner
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer
from argrpo.token_scores import TokensToScore, head_inputs


class OurStep:
    """Engine, tokenizer, judges in one batch, fused head, AdamW on fp32 masters."""

    name = "argrpo"

    def __init__(
        self, case: StepCase, policy: LlamaGen, tokenizer: VQTokenizer, judges: Judges
    ) -> None:
        self._case, self._tokenizer, self._judges = case, tokenizer, judges
        self._labels = case.labels
        self._learner = Learner(policy, case.config)
        self._engine = RolloutEngine(policy, max_slots=case.draw.images)
        self._clock = case.make_clock()
        self._num_steps = 0
        self.facts = {
            "how": "as argrpo train makes it: log-probs and entropies fused, fp32 masters"
        }

    def run(self, seed: int) -> dict[str, float]:
        case, clock = self._case, self._clock
        clock.start_step()
        with clock.phase("rollout"):
            rollout = self._engine.draw(self._labels, case.draw.params, seed=seed)
        with clock.phase("decode"):
            batch = case.config.tokenizer.decode_batch
            images = self._tokenizer.decode(rollout.token_ids, decode_batch=batch)
        with clock.phase("reward"):
            scores = self._judges.together(images, self._labels).cpu()
            advantages = case.advantages(scores)
        with clock.phase("logprob"):
            experience = self._learner.prepare(rollout, advantages)
        with clock.phase("update"):
            self._learner.learn(experience, self._num_steps)
        self._num_steps += 1
        return clock.finish_step(len(rollout), rollout.token_ids.numel())


def our_gradients(
    case: StepCase,
    policy: LlamaGen,
    tokens: TokensToScore,
    advantages: Tensor,
    ref_logprobs: Tensor,
) -> dict[str, Tensor]:
    """The gradient of the loss by name of the weight, through the head that training uses."""
    inputs = head_inputs(policy, tokens)
    head_grad = torch.zeros_like(policy.head_weight, dtype=torch.float32)
    num_images, num_tokens = tokens.token_ids.shape
    scale = LossScale(num_images, num_images * num_tokens, num_tokens)
    batch = LossBatch(advantages, scale, ref_logprobs=ref_logprobs)
    backward(inputs, policy.head_weight, head_grad, batch, case.config.objective)
    found = {
        name: head_grad if weight is policy.head_weight else weight.grad
        for name, weight in policy.named_parameters()
    }
    policy.zero_grad(set_to_none=True)
    return {name: grad for name, grad in found.items() if grad is not None}
