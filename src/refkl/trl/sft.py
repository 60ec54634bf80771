"""SFT with a refkl reference: TRL's supervised fine-tuning, KL-regularised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl import SFTConfig, SFTTrainer

from refkl.hf.observed_loss import EXACT, Watch, predicts_its_labels
from refkl.hf.supervised import SupervisedKL
from refkl.reference.pair import Compared, compare
from refkl.scoring import Scored, score_model
from refkl.trl.documents import Documents
from refkl.trl.scored_model import ScoredModel
from refkl.types import TokenBatch, TokenScores


class KLSFTTrainer(SupervisedKL, SFTTrainer):
    """trl.SFTTrainer with `reference=`, `kl=`, `kl_on=` and `sync=`; everything else is TRL's.

    Loss and `eval_loss` are TRL's own plus coef · KL(policy ‖ reference), the exact KL as a mean over the tokens of the
    optimizer step; see refkl.hf.KLTrainer. The policy runs once, except where TRL itself runs it twice.

    With `packing` or `padding_free`, documents that TRL lays in one row are scored apart, in policy and reference, with
    any attention implementation.

    Besides the extended trainer's arguments, it takes those of `refkl.hf.KLTrainerMixin`. Specific to this trainer:

    Args:
        kl: the penalty, with the exact KL. The default coefficient is 0.05; 0 only measures the KL.
        kl_on: tokens at which the KL is computed: "labels" for those with a label; "all" for every token that is
            attended to, including prompts.

    Raises:
        ValueError: an estimator for sampled tokens; labels that are not the batch's own tokens.
    """

    args: SFTConfig

    def _check_made(self) -> None:
        super()._check_made()
        if self.padding_free:
            self.data_collator = Documents(self.data_collator, self._tokenizer.pad_token_id)

    def _fused(self) -> bool:
        smoothed = self.label_smoother is not None and self.args.loss_type == "nll"
        return self.compute_loss_func is None and not smoothed  # for these TRL uses the logits

    def _compared(
        self,
        loss_of: Callable[[Any], Any],
        model: Any,
        inputs: dict[str, Any],
        batch: TokenBatch,
        ready: TokenScores | None,
        return_outputs: bool,
    ) -> tuple[Any, Compared]:
        if not predicts_its_labels(inputs, batch):
            raise ValueError(
                f"{type(self).__name__} scores the tokens of input_ids, but the batch has labels that differ from them "
                "or are on padding or right after it. Make labels from input_ids, with -100 where there is no label, "
                "and pad on the right."
            )
        watch = Watch(self.reference, batch)

        def score(_: TokenBatch, **options: Any) -> Scored:
            if watch.found is not None:  # only for TRL's metrics
                return score_model(model, batch, entropy="detached", **options)
            watch.found = compare(model, self.reference, batch, EXACT, ref_scores=ready, entropy="detached", **options)
            return watch.found.scored

        def observed(*args: Any, **kwargs: Any) -> Any:
            with watch.open(model):
                return model(*args, **kwargs)

        result = loss_of(ScoredModel(score, model=model, plain=observed, statistics=("is_top1",)))
        if watch.found is None:
            raise ValueError(f"The compute_loss of {type(self).__name__} did not run the policy, so there is no KL.")
        return result, watch.found
