r"""CACTUs: meta-learning without labels, on tasks whose classes are clusters of embeddings.

    embeddings z of the unlabelled images, by whatever needs no labels;
    partitions P_1 .. P_R: k-means of A_r z, A_r a random diagonal matrix [abs for several random scalings];
    a task: one partition, N of its clusters, images of each in support and query [abs].

MAML (`ssl_tasks/maml.py`) trains an initial network on such tasks. The scalings' entries are uniform in (0, 1) over
standardised coordinates [rec]. The network begins where the embedding's encoder ended [ours]; published: from scratch.

Reference: K. Hsu, S. Levine, C. Finn, "Unsupervised learning via meta-learning", ICLR 2019, arXiv 1810.02334.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssl_tasks.controls import CONTROLS, SAME_STEPS
from ssl_tasks.evaluate import features
from ssl_tasks.fewshot import ClassTasks
from ssl_tasks.maml import MEASURES, SUPERVISED, Maml, MamlOptions
from ssl_tasks.readers import to_float
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.system import COLUMNS, Arm, Experiment, System, Trial


@dataclass(frozen=True, kw_only=True)
class CACTUs(System):
    """CACTUs, in the letters of docs/cactus.md.

    Attributes:
        source: the data; half of the classes are kept out of the unlabelled images, and evaluation is about them.
        pretraining: of the embedding's encoder, at which MAML begins.
        evaluation: downstream, on all classes.
        maml: MAML.
        embedding: what is clustered. pretext: the pretrained encoder's features; pca: the leading components of the
            pixels; pixels: themselves.
        components: of pca.
        partitions: R.
        clusters: k of k-means.
        queries: query images of a cluster, besides its one support image.
    """

    name: ClassVar[str] = "cactus"
    about: ClassVar[str] = "CACTUs: MAML on clusters of embeddings (arXiv 1810.02334)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False, num_unseen=5))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=300))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(steps=100))
    maml: MamlOptions = field(default_factory=Maml)
    embedding: Literal["pretext", "pca", "pixels"] = "pretext"
    components: int = 32
    partitions: int = 5
    clusters: int = 25
    queries: int = 2

    def __post_init__(self) -> None:
        for name in ("partitions", "clusters", "queries", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def presets(cls) -> Mapping[str, CACTUs]:
        """Return the named settings; "paper" has 50 partitions into 500 clusters and a convnet, the rest is [rec]."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False, num_unseen=5)}
        convnet = replace(LARGE["pretraining"], encoder="convnet", widths=(32, 32, 32, 32), norm="group")
        large = Source(data="folder", size=84, shifted=False, num_labels=20_000, num_validation=4000, num_unseen=20)
        own = {"source": large, "pretraining": convnet, "evaluation": LARGE["evaluation"]}
        maml = Maml(steps=60_000, inner_steps=5, inner_rate=0.05, episodes=1000)
        return {
            "tiny": cls(**tiny, maml=Maml(steps=3, tasks=4, episodes=5, episode_queries=4), partitions=2, clusters=10),
            "small": cls(),
            "paper": cls(**own, maml=maml, partitions=50, clusters=500, queries=5),
        }

    def experiment(self) -> Experiment:
        """Return the controls, MAML with labels, and an arm for each hypergradient method."""
        own, once = self.maml, replace(self, partitions=1)
        size = own.tasks * own.ways * (1 + self.queries)

        def arms(system: CACTUs) -> dict[str, Arm]:
            shots = {"shots": 1, "queries": self.queries, "per_step": min(size, self.pretraining.batch_size * 2)}
            return own.arms("CACTUs", system.tasks, self.pretraining, **shots)

        checked = arms(once)  # one partition tells whether the graph is sound
        return Experiment(
            title="CACTUs",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms={name: replace(arm, check=checked[name].check) for name, arm in arms(self).items()},
            over=SAME_STEPS,
            controls=(*CONTROLS, SUPERVISED),
            extra=lambda _, trial: own.measure(trial),
            columns={**MEASURES, **COLUMNS},
            paired="one_shot",
            panels={"one_shot": "1-shot, unseen classes, %", "five_shot": "5-shot, unseen classes, %"},
            curves={"accuracy": "query accuracy on training tasks, %"},
        )

    def tasks(self, trial: Trial) -> ClassTasks:
        """Return the stream of tasks of one trial; the clusters are those of its encoder as it is now."""
        embedded = self.embedded(trial)
        return ClassTasks(
            images=trial.data.pretext,
            partitions=partitions(embedded, count=self.partitions, clusters=self.clusters, seed=trial.seed),
            tasks=self.maml.tasks,
            ways=self.maml.ways,
            shots=1,
            queries=self.queries,
            seed=trial.seed + 20_000,
        )

    def embedded(self, trial: Trial) -> Tensor:
        """Return what is clustered, (n, dim)."""
        images = trial.data.pretext
        if self.embedding == "pretext":
            return features(trial.backbone.encoder, images)
        pixels = to_float(images).flatten(1)
        if self.embedding == "pixels":
            return pixels
        centred = pixels - pixels.mean(0)
        return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[: self.components].T


def partitions(z: Tensor, *, count: int, clusters: int, seed: int) -> tuple[Tensor, ...]:
    """Return `count` partitions of the rows of `z` by k-means of randomly scaled, standardised coordinates.

    Args:
        z: embeddings, (n, dim).
        count: how many.
        clusters: k.
        seed: draws scalings and starts.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for more clusters than rows.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError(
            "cactus clusters embeddings by scikit-learn's KMeans, and scikit-learn does not import: "
            "pip install scikit-learn, or take umtra, which needs no clusters."
        ) from error
    if clusters > len(z):
        raise ValueError(f"{clusters} clusters of {len(z)} images; ask for fewer clusters.")
    generator = torch.Generator().manual_seed(seed)
    own = ((z - z.mean(0)) / z.std(0, correction=0).clamp_min(1e-8)).detach().cpu()
    found: list[Tensor] = []
    for k in range(count):
        scaled = own * torch.rand(own.shape[1], generator=generator, dtype=own.dtype)
        labels: Any = KMeans(clusters, n_init=1, random_state=seed + k).fit_predict(scaled.numpy())
        found.append(torch.as_tensor(labels, dtype=torch.int64))
    return tuple(found)
