"""KL-regularised supervised fine-tuning: the loss of a Trainer, plus coef · KL(policy ‖ reference).

The texts are given, not sampled from the policy. k1, k2 and k3 estimate the KL only on tokens that the policy sampled.
On given text, their means are another quantity: the mean of k1 is the reference's loss minus the policy's. The KL here
is therefore exact, over the whole vocabulary at each position of the texts.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput, logging

from refkl.backend import base_model, full_shape
from refkl.config import KLConfig
from refkl.hf.observed_loss import IGNORED, CrossEntropy, Watch, predicts_its_labels
from refkl.hf.trainer_mixin import KLTrainerMixin, joined
from refkl.messages import unknown
from refkl.penalty import global_normalizer
from refkl.reference.pair import Compared
from refkl.types import TokenBatch, TokenScores

logger = logging.get_logger(__name__)

KLOn = Literal["labels", "all"]
_TEXT = {"input_ids", "attention_mask", "labels"}
_SCORED = "reference_scores"


class SupervisedKL(KLTrainerMixin):
    """Base class of KLTrainer and KLSFTTrainer."""

    kl_on: KLOn = "labels"
    """Tokens at which the KL is computed: "labels" for those with a label; "all" for every token that is attended to,
    including prompts."""
    _count: Tensor | None = None
    """Divisor of each micro-batch's KL in this optimizer step."""

    def __init__(self, *args: Any, kl: KLConfig | None = None, kl_on: KLOn = "labels", **kwargs: Any) -> None:
        """Make the trainer, with the arguments of KLTrainerMixin and `kl_on`."""
        self.kl_on = kl_on
        self._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        super().__init__(*args, kl=kl, **kwargs)

    def _check_arguments(self) -> None:
        self._given.kl = (self._given.kl or KLConfig()).on_given_text()
        if self.kl_on not in get_args(KLOn):
            raise unknown("kl_on", str(self.kl_on), get_args(KLOn))

    def _penalty(self) -> KLConfig:
        assert self._given.kl is not None, "settled before the trainer was made"
        return self._given.kl

    def _inner(self) -> nn.Module:
        return base_model(self.accelerator.unwrap_model(self.model))

    def _check_made(self) -> None:
        """Raise ValueError if this Trainer or model is not supported."""
        name, inner = type(self).__name__, self._inner()
        kind = type(inner).__name__
        if vars(self)["model_init"] is not None:
            raise ValueError(
                f"{name} builds its reference from the policy, but model_init makes another policy when training "
                "begins. Pass model=."
            )
        if not isinstance(inner, PreTrainedModel) or not inner.can_generate() or inner.config.is_encoder_decoder:
            raise ValueError(
                f"{name} compares the next-token distributions of causal language models, and {kind} is not one. Use "
                "AutoModelForCausalLM."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not run in nn.DataParallel, which transformers uses where one process sees "
                f"{self.args.n_gpu} GPUs. Start it with accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES)."
            )

    @cached_property
    def _takes(self) -> frozenset[str]:
        """The names of the arguments of the model's forward."""
        return frozenset(inspect.signature(type(self._inner()).forward).parameters)

    def _batch_of(self, inputs: dict[str, Any]) -> TokenBatch:
        """Return the tokens of a micro-batch; scored tokens are those at which the KL is computed.

        Raises:
            ValueError: there are no labels, the labels are not a causal language model's, or sequences are not padded.
        """
        ids, labels, attention = (inputs.get(name) for name in ("input_ids", "labels", "attention_mask"))
        name = type(self).__name__
        if ids is None or labels is None or labels.shape != ids.shape:
            raise ValueError(
                f"{name} needs input_ids and labels of one shape, -100 where there is no label, and got a batch of "
                f"{sorted(inputs)}. A collator such as DataCollatorForLanguageModeling(tokenizer, mlm=False) makes "
                "them."
            )
        if attention is None:
            if flat := sorted(inputs.keys() & {"position_ids", "cu_seq_lens_q", "seq_idx", "shift_labels"}):
                raise ValueError(
                    f"The batch has {', '.join(flat)} and no attention_mask: its sequences are packed, but {name} "
                    "separates sequences by their padding. Use a collator that pads."
                )
            attention = torch.ones_like(ids)
        real = attention.bool()
        scored = real if self.kl_on == "all" else real & (labels != IGNORED)
        known = {*_TEXT, "position_ids", "use_cache", "num_items_in_batch", _SCORED}
        own = {name: value for name, value in inputs.items() if name in self._takes and name not in known}
        return TokenBatch(ids, attention, scored, inputs.get("position_ids"), own, self.scoring.prefix)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Count the tokens of the optimizer step, over its micro-batches and all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            parts = [self._batch_of(batch) for batch in batches]
            masks = [part.completion_mask.to(self.accelerator.device) for part in parts]
            self._count = global_normalizer(masks, self.penalty.config.aggregation, self.accelerator)
            self._begin_step(batches, parts)
        return batches, items

    def _begin_step(self, batches: list[dict[str, Any]], parts: list[TokenBatch]) -> None:
        """Score all micro-batches with the reference if it scores in one sweep, and store the scores in them."""
        plain = all(not part.model_inputs and part.position_ids is None for part in parts)
        if not (self.reference.one_sweep and plain and self._fused()):
            return
        width = max(part.input_ids.shape[1] for part in parts)

        def together(tensors: list[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in tensors])

        whole = TokenBatch(
            together([part.input_ids for part in parts]),
            together([part.attention_mask for part in parts]),
            together([part.completion_mask for part in parts]),
            prefix=self.scoring.prefix,
        )
        scores = self.reference.score(whole.to(self.accelerator.device), hidden=True)
        assert scores.hidden is not None, "asked for"
        rows = [len(part) for part in parts]
        for batch, part, logp, hidden in zip(
            batches, parts, scores.logp.split(rows), scores.hidden.split(rows), strict=True
        ):
            length = part.input_ids.shape[1]
            own = TokenScores(logp[:, :length], hidden=hidden[:, :length], fingerprint=scores.fingerprint)
            batch[_SCORED] = own

    def _fused(self) -> bool:
        """Return True if the settings allow losses to be computed inside the policy's forward."""
        raise NotImplementedError

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the trainer's own loss plus coef · KL, from one forward of the policy.

        Raises:
            ValueError: see `_batch_of`; the first forward of the loss is not on the batch.
        """
        ready = inputs.pop(_SCORED, None)
        batch = self._batch_of(inputs)
        options = {"return_outputs": return_outputs}
        if num_items_in_batch is not None:
            options["num_items_in_batch"] = num_items_in_batch
        own = super().compute_loss

        def loss_of(policy: Any) -> Any:
            return own(policy, inputs, **options)

        result, found = self._compared(loss_of, model, inputs, batch, ready, return_outputs)
        if self.model.training:
            self.kl_state.last_batch = batch
        output = self._penalise(
            found.scored.scores.logp,
            found.reference.logp,
            batch.completion_mask,
            1.0,
            divergence=found.divergence,
            normalizer=self._normalizer(num_items_in_batch),
            fingerprint=found.reference.fingerprint,
        )
        if not self.penalty.coef:
            return result
        return (result[0] + output.loss, *result[1:]) if return_outputs else result + output.loss

    def _compared(
        self,
        loss_of: Callable[[Any], Any],
        model: Any,
        inputs: dict[str, Any],
        batch: TokenBatch,
        ready: TokenScores | None,
        return_outputs: bool,
    ) -> tuple[Any, Compared]:
        """Return the result of `loss_of` for the policy or its stand-in, and the comparison."""
        raise NotImplementedError

    def _normalizer(self, items: Any) -> Tensor | None:
        if not self.model.training or not self.penalty.coef or self._count is None:
            return None
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:  # as training_step decides whether to divide by the number of micro-batches
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return self._count if scaled else self._count / self.current_gradient_accumulation_steps


class KLTrainer(SupervisedKL, Trainer):
    """transformers.Trainer with `reference=`, `kl=`, `kl_on=` and `sync=`; everything else is the Trainer's.

    Loss and `eval_loss` are the Trainer's own plus coef · KL(policy ‖ reference), a mean over the tokens of the
    optimizer step. `kl` is logged; the Trainer's own loss is the logged loss minus `kl/coef` · `kl`.

    The policy runs once. If the loss is the model's own cross-entropy, loss and KL come from the fused output head, and
    the logits are never stored. Any other loss (label smoothing, compute_loss_func, a compute_loss of a subclass, an
    auxiliary loss of the model) is computed as without the penalty, and the KL comes from the logits that it uses.

    If a batch has padding on the left and no position_ids, positions are counted from the attention mask.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: the penalty, with the exact KL. The default coefficient is 0.05; 0 only measures the KL.
        kl_on: tokens at which the KL is computed: "labels" for those with a label; "all" for every token that is
            attended to, including prompts.

    Raises:
        ValueError: an estimator for sampled tokens; a model that is not a causal language model; an option of the
            Trainer that refkl does not support.
    """

    _alike = True
    """True if, on all ranks, the labels of this optimizer step are the tokens that the scorer scores."""
    _plain: bool | None = None
    """True if the model's own loss is only cross-entropy; None until it was checked."""
    _shows_outputs = True
    """True if the caller that asks for a loss's outputs uses them."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the KL's metrics: means over the steps since the last log."""
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        logs.update({f"{prefix}{name}": sum(values) / len(values) for name, values in self._metrics[mode].items()})
        self._metrics[mode].clear()
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Predict as transformers does. transformers asks for the outputs even if it drops them; `_compared` needs to
        know that."""
        self._shows_outputs = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._shows_outputs = True

    def _begin_step(self, batches: list[dict[str, Any]], parts: list[TokenBatch]) -> None:
        self._alike = self._on_all_ranks(all(map(_is_text, batches, parts)))
        if self._alike:
            super()._begin_step(batches, parts)

    def _on_all_ranks(self, fits: bool) -> bool:
        """Return True if `fits` holds on all ranks. A rank that scores in another way would wait for gathers
        forever."""
        if self.accelerator.num_processes == 1:
            return fits
        misfits = torch.tensor(float(not fits), device=self.accelerator.device)
        return not bool(self.accelerator.reduce(misfits, reduction="sum"))

    def _fused(self) -> bool:
        owner = next(c for c in type(self).__mro__ if "compute_loss" in vars(c) and not issubclass(c, KLTrainerMixin))
        own = owner is Trainer and self.compute_loss_func is None and self.label_smoother is None
        return own and self._plain is not False

    def _is_plain(self, model: nn.Module) -> bool:
        """Return True if the loss is only cross-entropy; every rank must call this."""
        if self._plain is None:
            self._plain = self._fused() and self._shows_plain(model)
            if not self._plain:
                logger.warning(
                    "The loss is not only the model's cross-entropy, so it is computed unchanged, and the KL is "
                    "computed from the full logits of policy and reference, which takes memory for both."
                )
        return self._plain

    @torch.no_grad()
    def _shows_plain(self, model: nn.Module) -> bool:
        """Compare the model's loss on a few tokens with the cross-entropy of its logits."""
        weight: Any = base_model(model).get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.arange(_LOOKED_AT, device=self.accelerator.device)[None] % full_shape(weight)[0]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        divisor = _LOOKED_AT - 1.0
        if self.model_accepts_loss_kwargs:
            divisor = 3.0
            inputs["num_items_in_batch"] = torch.tensor(divisor, device=ids.device)
        options = {"use_cache": False} if "use_cache" in self._takes else {}
        outputs = model(**inputs, **options)
        if not isinstance(outputs, ModelOutput) or outputs.get("loss") is None or outputs.get("logits") is None:
            return False
        logits = outputs["logits"][0, -_LOOKED_AT:-1].double()
        expected = F.cross_entropy(logits, ids[0, 1:], reduction="sum") / divisor
        return bool(torch.isclose(outputs["loss"].double(), expected, rtol=1e-5, atol=1e-6))

    def _compared(
        self,
        loss_of: Callable[[Any], Any],
        model: Any,
        inputs: dict[str, Any],
        batch: TokenBatch,
        ready: TokenScores | None,
        return_outputs: bool,
    ) -> tuple[Any, Compared]:
        alike = self._alike if self.model.training else self._on_all_ranks(_is_text(inputs, batch))
        if alike and not (return_outputs and self._shows_outputs) and self._is_plain(model):
            view = CrossEntropy(model, self.reference, batch, ready)
            return loss_of(view), view.found
        watch = Watch(self.reference, batch)
        with watch.open(model):
            result = loss_of(model)
        assert watch.found is not None, "it was open"
        return result, watch.found


_LOOKED_AT = 8
"""Number of tokens in the check of a model's own loss."""


def _is_text(inputs: dict[str, Any], batch: TokenBatch) -> bool:
    return not batch.model_inputs and predicts_its_labels(inputs, batch)


_Trainer = TypeVar("_Trainer")


def with_reference(trainer: type[_Trainer]) -> type[_Trainer]:
    """Return the trainer class with `reference=`, `kl=`, `kl_on=` and `sync=`, as in KLTrainer.

        MyKLTrainer = with_reference(MyTrainer)  # class MyTrainer(Trainer)

    Args:
        trainer: transformers.Trainer or a subclass. For TRL's trainers and their subclasses use
            refkl.trl.with_reference.

    Raises:
        ValueError: any other class.
    """
    if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
        raise ValueError(f"with_reference takes transformers.Trainer or a subclass, but was given {trainer!r}.")
    if issubclass(trainer, KLTrainerMixin):
        return trainer
    if any(cls.__module__.split(".")[0] == "trl" for cls in trainer.__mro__):
        raise ValueError(f"{trainer.__name__} is one of TRL's trainers: use refkl.trl.with_reference.")
    if trainer is Trainer:
        return KLTrainer  # type: ignore[return-value]
    return joined(KLTrainer, trainer)
