"""The contrastive loss, the encoders and the measures of the SSL systems against independent computations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_tasks import episodes
from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Data, Split
from ssl_tasks.encoders import MLP, ConvNet, EncoderName, classifier_head, encoder, projection_head
from ssl_tasks.evaluate import alignment, effective_rank, fine_tune, knn, linear_probe, plane
from ssl_tasks.losses import nt_xent
from ssl_tasks.vit import ViT


@pytest.fixture
def blobs() -> Data:
    """Three Gaussian classes, well apart, as 1x2x2 images."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        noise = 0.3 * torch.randn(count, 4, generator=generator)
        return Split((centres[labels] + noise).view(-1, 1, 2, 2), labels)

    return Data("blobs", split(30).images, split(60), split(30), split(90), 3)


def test_nt_xent_equals_its_sum_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    z = torch.cat([a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)])
    total = 0.0
    for i in range(10):
        others = [math.exp(float(z[i] @ z[j]) / 0.3) for j in range(10) if j != i]
        total += math.log(sum(others)) - float(z[i] @ z[(i + 5) % 10]) / 0.3
    assert float(nt_xent(a, b, temperature=0.3)) == pytest.approx(total / 10, rel=1e-12)


def test_nt_xent_has_both_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nt_xent, (a, b)) and torch.autograd.gradgradcheck(nt_xent, (a, b))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (torch.rand(2, 3), torch.rand(3, 3), {}, r"one shape \(n, d\), got \(2, 3\) and \(3, 3\)"),
        (torch.rand(3), torch.rand(3), {}, r"one shape \(n, d\)"),
        (torch.rand(2, 3), torch.rand(2, 3), {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_embeddings_are_refused(a: torch.Tensor, b: torch.Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(a, b, **options)


@pytest.mark.parametrize(
    ("name", "widths"), [("mlp", None), ("convnet", None), ("resnet18", (8,)), ("resnet50", (8,)), ("vit", None)]
)
def test_encoders_have_the_promised_shape_and_their_own_seed(name: EncoderName, widths: tuple[int, ...] | None) -> None:
    before = torch.get_rng_state()
    one, two, other = (encoder(name, (3, 14, 14), widths=widths, seed=seed).eval() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.rand(3, 3, 14, 14)
    assert one(images).shape == (3, one.dim)
    assert torch.equal(one(images), two(images)) and not torch.equal(one(images), other(images))
    assert projection_head(one.dim, out=7)(one(images)).shape == (3, 7)
    assert classifier_head(one.dim, 4)(one(images)).abs().max() == 0


def test_bad_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'vgg'; expected one of mlp, convnet, resnet18"):
        encoder("vgg", (1, 14, 14), seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 8 pixels a side, got 4 x 4"):
        encoder("resnet18", (1, 4, 4), seed=0)
    with pytest.raises(ValueError, match="widths of resnet50 must be 1 number, the first stage's channels; got"):
        encoder("resnet50", (1, 16, 16), widths=(8, 8), seed=0)
    with pytest.raises(ValueError, match="widths of vit must be 2 numbers, its dimension and its depth"):
        encoder("vit", (1, 16, 16), widths=(8,), seed=0)
    with pytest.raises(ValueError, match="patches of 5 pixels do not divide an image of 14 x 14"):
        ViT((1, 14, 14), patch=5)
    with pytest.raises(ValueError, match="dim=10 is no multiple of heads=4"):
        ViT((1, 14, 14), dim=10)
    with pytest.raises(ValueError, match="norm must be"):
        ConvNet((1, 14, 14), norm="layer")
    with pytest.raises(ValueError, match="at least one width"):
        MLP((1, 14, 14), ())
    with pytest.raises(ValueError, match="at least one number of channels"):
        ConvNet((1, 14, 14), ())


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_convnet_differentiates_twice(norm: str) -> None:
    torch.manual_seed(0)
    net = ConvNet((1, 8, 8), (8, 16), norm=norm)
    params = list(net.parameters())
    grads = torch.autograd.grad(net(torch.rand(4, 1, 8, 8)).square().sum(), params, create_graph=True)
    products = torch.autograd.grad(sum(g.square().sum() for g in grads), params)
    assert all(bool(p.isfinite().all()) for p in products) and any(bool((p != 0).any()) for p in products)


def test_the_probe_is_at_its_optimum_and_draws_nothing(blobs: Data) -> None:
    before = torch.get_rng_state()
    score = linear_probe(nn.Flatten(), blobs)
    assert score == linear_probe(nn.Flatten(), blobs) and torch.equal(torch.get_rng_state(), before)
    assert score.test > 95 and score.validation > 95


def test_the_probe_agrees_with_scikit_learn(blobs: Data) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    penalty, n = 0.1, len(blobs.train)
    x = {k: s.images.flatten(1).double().numpy() for k, s in (("train", blobs.train), ("test", blobs.test))}
    scaler = StandardScaler().fit(x["train"])
    model = LogisticRegression(C=1 / (penalty * n), tol=1e-8, max_iter=1000)
    model.fit(scaler.transform(x["train"]), blobs.train.labels.numpy())
    expected = 100 * model.score(scaler.transform(x["test"]), blobs.test.labels.numpy())
    assert linear_probe(nn.Flatten(), blobs, penalties=(penalty,)).test == pytest.approx(expected)


def test_one_neighbour_is_the_nearest_by_cosine(blobs: Data) -> None:
    train = F.normalize(blobs.train.images.flatten(1), dim=1)
    test = F.normalize(blobs.test.images.flatten(1), dim=1)
    guess = blobs.train.labels[(test @ train.T).argmax(1)]
    expected = 100 * float((guess == blobs.test.labels).double().mean())
    assert knn(nn.Flatten(), blobs, neighbours=(1,)).test == pytest.approx(expected)
    with pytest.raises(ValueError, match="61 neighbours asked for, but there are 60 training images"):
        knn(nn.Flatten(), blobs, neighbours=(61,))


def test_fine_tuning_leaves_the_encoder_alone_and_chooses_on_validation(blobs: Data) -> None:
    net = encoder("mlp", (1, 2, 2), widths=(8,), seed=0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    score = fine_tune(net, blobs, learning_rates=(1e-6, 0.1), steps=60, batch_size=20)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert score.chosen == 0.1 and score.test > 90
    with pytest.raises(ValueError, match="learning_rates needs at least one candidate, all positive"):
        fine_tune(net, blobs, learning_rates=())


def test_effective_rank_knows_collapse_and_full_spread() -> None:
    assert effective_rank(torch.ones(10, 4)) == 1
    line = torch.linspace(-1, 1, 11)[:, None] * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5)


def test_alignment_is_zero_for_views_alike_and_two_for_chance() -> None:
    images = torch.rand(40, 1, 6, 6)
    still = Augmentation(min_scale=1.0, flip=False, brightness=0.0, contrast=0.0, blur=0.0)
    assert alignment(nn.Flatten(), images, still) < 1e-9
    noise = Augmentation(min_scale=1.0, flip=False, brightness=0.0, contrast=0.0, blur=0.0, noise=100.0)
    net = nn.Sequential(nn.Flatten(), _Centred())
    assert alignment(net, images, noise) == pytest.approx(2, abs=0.3)


class _Centred(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


def test_fine_tuning_draws_pairs_of_rate_and_decay(blobs: Data) -> None:
    options = dict(learning_rates=(1e-6, 0.1), weight_decays=(0.0, 1e-4), steps=20, batch_size=20)
    net = encoder("mlp", (1, 2, 2), widths=(8,), seed=0)
    whole, drawn = fine_tune(net, blobs, **options), fine_tune(net, blobs, draws=1, seed=1, **options)  # type: ignore
    assert whole.chosen == 0.1 and drawn.chosen in (1e-6, 0.1)
    assert fine_tune(net, blobs, draws=1, seed=1, **options) == drawn  # type: ignore


def test_episodes_know_a_perfect_and_a_blind_encoder() -> None:
    labels = torch.arange(60) % 6
    assert episodes.accuracy(torch.eye(6)[labels], labels, ways=5, count=5) == 100
    blind = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    assert episodes.accuracy(blind, torch.arange(600) % 6, ways=5, count=50) == pytest.approx(20, abs=5)
    with pytest.raises(ValueError, match="classes with more than 10 images; there are 0"):
        episodes.accuracy(torch.eye(6)[labels], labels, ways=5, shots=10)


def test_the_plane_is_the_two_leading_components() -> None:
    x = torch.randn(50, 1, 1, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 1, 1, 1])
    found, values = plane(nn.Flatten(), x), torch.linalg.svdvals((x.flatten(1) - x.flatten(1).mean(0)).double())
    torch.testing.assert_close(found.norm(dim=0), values[:2])
