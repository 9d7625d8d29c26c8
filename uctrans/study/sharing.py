"""The weights of the best run of each network of a study in a form to share: OUTPUT/weights/VARIANT/."""

import dataclasses
from pathlib import Path

from uctrans.model_card import CardScores, ModelCard
from uctrans.models.base import read_config
from uctrans.sharing import checksum, folds_file, prediction_flags, scored_in_words, training_command, write_shared
from uctrans.study.best import BestRun
from uctrans.study.config import StudyConfig
from uctrans.study.files import WEIGHTS


def share_best(config: StudyConfig, best: dict[str, BestRun], fingerprint: str | None) -> None:
    """Write or renew the folders; print a line of each that cannot be written, or whose card was edited.

    Args:
        config: of the study.
        best: the best run of each variant by its name.
        fingerprint: of the images of the study.
    """
    for name, chosen in best.items():
        if chosen.obstacle:
            print(f"weights of {name} are not shared: {chosen.obstacle}", flush=True)
            continue
        card = _card(name, chosen, config, fingerprint)
        if remark := write_shared(Path(config.output) / WEIGHTS / name, chosen.weights, card).remark:
            print(remark, flush=True)


def _card(name: str, chosen: BestRun, config: StudyConfig, fingerprint: str | None) -> ModelCard:
    run, result = chosen.run, chosen.result
    scoring = {"resolution": run.scored["score_resolution"], "tta": run.scored["score_tta"]}
    scores = {
        key: [each.scores[key] for each in chosen.peers if each.scores.get(key) is not None] for key in result.scores
    }
    return ModelCard(
        title=name,
        model=read_config(chosen.weights),
        checksum=checksum(chosen.weights),
        selection=_selection(chosen),
        command=training_command(dataclasses.replace(run.config, patience=chosen.patience)),
        dataset=config.dataset_name or Path(config.data).resolve().name,
        fingerprint=fingerprint,
        scores=CardScores(
            means=result.scores,
            counts=result.counts,
            images=result.images,
            split="test",
            scored_at=scored_in_words(result.scored_at, run.scored["score_tta"]),
            flags=prediction_flags(scoring),
            runs=scores,
        ),
        license=config.license,
        folds=folds_file(run.config),
    )


def _selection(chosen: BestRun) -> str:
    where = f"{chosen.run.label}, patience {chosen.patience}"
    if chosen.scored == 1:
        sentences = [f"The only run of this network in a study that was scored ({where})."]
    else:
        sentences = [
            f"Of {chosen.scored} runs of this network in a study this one ({where}) has the best validation Dice. "
            "Scores on test images played no part in the choice."
        ]
    if chosen.scored > 1 and chosen.run.fold is not None:
        sentences.append("Validation images differ from fold to fold.")
    if chosen.failed:
        sentences.append(f"{chosen.failed} more diverged.")
    if chosen.missing:
        sentences.append(f"{chosen.missing} more were not over yet.")
    return " ".join(sentences)
