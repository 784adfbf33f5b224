"""iBOT, DINO and DINOv2: the losses against plain loops in float64, and the views against what the recipe says."""
import colorsys
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import ssl
import torch
import torchvision.transforms.functional as torchvision
from PIL import Image, ImageFilter, ImageOps

GLOBAL, LOCAL, K = 2, 3, 7  # views and prototypes of the tests of the loss


def reference_loss(student_cls, teacher_cls, student_patch, teacher_patch, mask, center_cls, center_patch,
                   teacher_temp):
    """iBOT's two terms as a loop over images and pairs of views, in float64. student_cls (V, B, K),
    teacher_cls (2, B, K), patches (2, B, N, K), mask (2, B, N)."""
    def cross_entropy(teacher, student, center):
        target = torch.exp((teacher - center) / teacher_temp)
        prediction = torch.exp(student / 0.1)
        return -(target / target.sum() * torch.log(prediction / prediction.sum())).sum()

    views, images = student_cls.shape[:2]
    pairs = []
    for q in range(2):
        for v in range(views):
            if v != q:
                terms = [cross_entropy(teacher_cls[q, b], student_cls[v, b], center_cls) for b in range(images)]
                pairs.append(sum(terms) / images)
    per_crop = []
    for q in range(2):
        for b in range(images):
            hidden = mask[q, b].nonzero()[:, 0].tolist()
            terms = [cross_entropy(teacher_patch[q, b, n], student_patch[q, b, n], center_patch) for n in hidden]
            per_crop.append(sum(terms) / len(terms) if terms else 0.0)
    return sum(pairs) / len(pairs), sum(per_crop) / len(per_crop)


def make_case(images=3, tokens=9, seed=0, local=LOCAL):
    """Random logits in [-1, 1], as cosines are, and masks of which some are empty."""
    generator = torch.Generator().manual_seed(seed)
    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    mask = torch.rand(GLOBAL, images, tokens, generator=generator) < 0.4
    mask[0, 1] = mask[1, 0] = False
    mask[0, 0, 2:5] = True
    return SimpleNamespace(mask=mask, student_cls=uniform(GLOBAL + local, images, K),
                           teacher_cls=uniform(GLOBAL, images, K), student_patch=uniform(GLOBAL, images, tokens, K),
                           teacher_patch=uniform(GLOBAL, images, tokens, K),
                           center_cls=0.3 * uniform(K), center_patch=0.3 * uniform(K))


def as_arguments(case):
    """The same, as collate_crops and the networks hand it to IBOTLoss: float32, crop by crop, masked tokens only."""
    side = math.isqrt(case.mask.shape[2])
    views = ssl.collate_crops({"mask": case.mask.transpose(0, 1).unflatten(2, (side, side))})
    where = views["masked_index"]
    student_cls, teacher_cls, student_patch, teacher_patch = (
        x.float() for x in (case.student_cls, case.teacher_cls, case.student_patch, case.teacher_patch))
    student = (student_cls.flatten(0, 1), student_patch.flatten(0, 2)[where])
    return student, (teacher_cls.flatten(0, 1), teacher_patch.flatten(0, 2)[where]), views["mask_weight"]


def both_terms(ibot, student, teacher, mask_weight, teacher_temp):
    """-> {"cls": L_[CLS], "mim": L_MIM}, the entropies."""
    cls, entropies = ibot.cls_loss(student[0], teacher[0], teacher_temp)
    return {"cls": cls, "mim": ibot.mim_loss(student[1], teacher[1], mask_weight, teacher_temp)}, entropies


def loss_with_centers(case):
    ibot = ssl.IBOTLoss(K, "cpu")
    ibot.centers = {"cls": case.center_cls.float(), "patch": case.center_patch.float()}
    return ibot


@pytest.mark.parametrize("local", [0, 1, LOCAL])
def test_loss_equals_the_loop_over_pairs_of_views(local):
    """[CLS] over all v != q, patches over v = q; a crop without mask counts as 0, not as absent."""
    case = make_case(local=local)
    ours, _ = both_terms(loss_with_centers(case), *as_arguments(case), teacher_temp=0.05)
    cls, mim = reference_loss(**vars(case), teacher_temp=0.05)
    assert ours["cls"].item() == pytest.approx(cls.item(), rel=1e-5)
    assert ours["mim"].item() == pytest.approx(mim.item(), rel=1e-5)


def test_gradient_of_the_student_equals_that_of_the_loop():
    """The loss could have the right value and detach what it must not, or weigh views unequally in the gradient."""
    case = make_case(seed=1)
    case.student_cls.requires_grad_()
    case.student_patch.requires_grad_()
    inputs = [case.student_cls, case.student_patch]
    ours, _ = both_terms(loss_with_centers(case), *as_arguments(case), teacher_temp=0.04)
    gradients = torch.autograd.grad(ours["cls"] + ours["mim"], inputs)
    expected = torch.autograd.grad(sum(reference_loss(**vars(case), teacher_temp=0.04)), inputs)
    for got, want in zip(gradients, expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not gradients[1][~case.mask].any(), "visible tokens are no part of the loss"


def test_loss_without_any_masked_token():
    """Half of the crops have no mask, so a small batch may have none at all: MIM is 0 and everything stays finite."""
    case = make_case()
    case.mask[:] = False
    ibot = loss_with_centers(case)
    ours, _ = both_terms(ibot, *as_arguments(case), teacher_temp=0.04)
    assert ours["mim"].item() == 0 and math.isfinite(ours["cls"].item())
    before = ibot.centers["patch"].clone()
    ibot.update_centers()
    assert torch.equal(ibot.centers["patch"], before), "no token, no news about their centre"
    assert not torch.equal(ibot.centers["cls"], case.center_cls.float())


def test_centers_follow_the_mean_of_all_micro_batches():
    """One update per step, with the mean over the global batch: micro-batches with more masked tokens weigh more."""
    cases = [make_case(images=2, seed=2), make_case(images=4, seed=3)]
    ibot = loss_with_centers(cases[0])
    for case in cases:
        both_terms(ibot, *as_arguments(case), 0.04)
        assert torch.equal(ibot.centers["cls"], cases[0].center_cls.float()), "the whole step sees the same centres"
    ibot.update_centers()
    all_cls = torch.cat([case.teacher_cls.flatten(0, 1) for case in cases])
    all_patches = torch.cat([case.teacher_patch[case.mask] for case in cases])
    expected = {"cls": 0.9 * cases[0].center_cls + 0.1 * all_cls.mean(0),
                "patch": 0.9 * cases[0].center_patch + 0.1 * all_patches.mean(0)}
    for name in expected:
        torch.testing.assert_close(ibot.centers[name].double(), expected[name], rtol=0, atol=1e-6)
    first = ibot.centers["cls"].clone()
    both_terms(ibot, *as_arguments(cases[1]), 0.04)
    ibot.update_centers()  # the next step begins with empty sums
    second = 0.9 * first.double() + 0.1 * cases[1].teacher_cls.flatten(0, 1).mean(0)
    torch.testing.assert_close(ibot.centers["cls"].double(), second, rtol=0, atol=1e-6)


def test_centers_are_summed_over_processes():
    """What is summed over processes is a sum and a count, so that unequal ones average rightly."""
    case, other = make_case(images=2, seed=4), make_case(images=5, seed=5)
    ibot, elsewhere = loss_with_centers(case), loss_with_centers(other)
    both_terms(ibot, *as_arguments(case), 0.04)
    both_terms(elsewhere, *as_arguments(other), 0.04)
    sums = iter([elsewhere.batch_sums["cls"], elsewhere.batch_sums["patch"]])
    ibot.sum_over_processes = lambda total: total + next(sums)
    ibot.update_centers()
    mean = torch.cat([case.teacher_patch[case.mask], other.teacher_patch[other.mask]]).mean(0)
    torch.testing.assert_close(ibot.centers["patch"].double(), 0.9 * case.center_patch + 0.1 * mean, rtol=0, atol=1e-6)


def test_logged_entropies_tell_collapse_from_uniform_output():
    """They are what a person looks at to see whether iBOT learns: 0 = one prototype for sure, log K = no preference."""
    def entropies(teacher_cls):
        (student_cls, _), _, _ = as_arguments(make_case(images=K))
        _, found = ssl.IBOTLoss(K, "cpu").cls_loss(student_cls, teacher_cls, 0.04)
        return {name: value.item() for name, value in found.items()}

    sure_of_one = torch.zeros(2 * K, K)
    sure_of_one[:, 3] = 10
    sure_of_each = 10 * torch.eye(K).repeat(2, 1)
    assert entropies(sure_of_one) == pytest.approx({"teacher_entropy": 0, "batch_entropy": 0}, abs=1e-3)
    assert entropies(torch.zeros(2 * K, K)) == pytest.approx(
        {"teacher_entropy": math.log(K), "batch_entropy": math.log(K)}, rel=1e-3)
    assert entropies(sure_of_each) == pytest.approx({"teacher_entropy": 0, "batch_entropy": math.log(K)}, abs=1e-3)


def test_collate_crops_sorts_by_crop_and_finds_the_masked_tokens():
    """The loss pairs crop q of image b with row q B + b; a mix-up trains on the wrong image and still goes down."""
    images, grid = 3, 4
    mask = torch.zeros(images, 2, grid, grid, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[0, 0, 3, 3] = mask[2, 1, 0, 0] = True
    tag = torch.arange(images)[:, None] * 10
    views = ssl.collate_crops({"global_crops": tag + torch.arange(2), "local_crops": tag + torch.arange(4),
                               "mask": mask})
    assert views["global_crops"].tolist() == [0, 10, 20, 1, 11, 21]
    assert views["local_crops"].tolist() == [0, 10, 20, 1, 11, 21, 2, 12, 22, 3, 13, 23]
    row_of_second_crop_of_third_image = 1 * images + 2
    assert views["masked_index"].tolist() == [1 * 4 + 2, 3 * 4 + 3, row_of_second_crop_of_third_image * 16]
    torch.testing.assert_close(views["mask_weight"], torch.tensor([1 / 12, 1 / 12, 1 / 6]))


# ----------------------------------------------------------------------------------------------------------------------
# DINO and DINOv2


def reference_sinkhorn(logits, temperature, iterations=3):
    """DINOv2's, (N, K), as loops in float64: prototypes get N / K each, then every row sums to 1."""
    q = [[math.exp(logit / temperature) for logit in row] for row in logits.double().tolist()]
    columns = len(q[0])
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in range(columns)]
        q = [[value / sums[k] / columns for k, value in enumerate(row)] for row in q]
        q = [[value / sum(row) for value in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def cosines(*shape):
    return torch.rand(*shape) * 2 - 1


def in_two_processes(function, rows):
    """function(its half of the rows, a sum over both) in two threads -> both results, one below the other."""
    barrier, given = threading.Barrier(2, timeout=100), {}

    def process(rank):
        def total(tensor):
            given[rank] = tensor
            barrier.wait()
            both = given[0] + given[1]
            barrier.wait()
            return both
        return function(rows.split([3, len(rows) - 3])[rank], total)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(process, (0, 1))))


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_sinkhorn_knopp_equals_the_loop(temperature):
    """Three iterations, as in DINOv2, in one process and in two with unequal shares."""
    logits = cosines(11, K)
    expected = reference_sinkhorn(logits, temperature)
    ours = ssl.sinkhorn_knopp(logits, temperature, lambda x: x)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-7)
    split = in_two_processes(lambda rows, total: ssl.sinkhorn_knopp(rows, temperature, total), logits)
    torch.testing.assert_close(split, ours)


def test_sinkhorn_knopp_gives_every_prototype_as_much():
    """Rows sum to 1 at once, columns to N / K in the end; nobody's tokens are nobody's."""
    logits = cosines(30, K) + torch.linspace(0, -0.5, K)  # some prototypes are liked more
    for iterations in 3, 200:
        q = ssl.sinkhorn_knopp(logits.clamp(-1, 1), 0.07, lambda x: x, iterations)
        torch.testing.assert_close(q.sum(1), torch.ones(30))
    torch.testing.assert_close(q.sum(0), torch.full((K,), 30 / K), rtol=1e-3, atol=0)
    assert ssl.sinkhorn_knopp(torch.zeros(0, K), 0.04, lambda x: x).shape == (0, K)
    assert torch.isfinite(ssl.sinkhorn_knopp(torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 0.01, lambda x: x)).all()


def test_koleo_equals_the_loop():
    """-mean log of the distance to the nearest other row of unit length, whatever the rows' lengths; its gradient is
    that of finite differences, and finite even for twins and for a row that is alone."""
    x = torch.randn(9, 4, dtype=torch.float64) * torch.linspace(0.1, 3, 9)[:, None]
    unit = x / x.norm(dim=1, keepdim=True)
    nearest = [min((unit[i] - unit[j]).norm().item() for j in range(9) if j != i) for i in range(9)]
    assert ssl.koleo(x).item() == pytest.approx(-sum(map(math.log, nearest)) / 9, rel=1e-4)
    for rows in x.float(), x[:1].float(), torch.ones(4, 3), torch.zeros(4, 3):
        rows.requires_grad_()
        value = ssl.koleo(rows)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(rows.grad).all()
    start = x.float().requires_grad_()
    for _ in range(100):  # it spreads the rows out
        gradient, = torch.autograd.grad(ssl.koleo(start), start)
        start = (start - 0.1 * gradient).detach().requires_grad_()
    assert ssl.koleo(start) < ssl.koleo(x) - 0.1


def test_dino_is_ibot_s_cls_term_alone():
    """No token is hidden, so there is no other term; iBOT and DINOv2 have masks."""
    crops = {method: ssl.MultiCrop(32, (0.25, 1.0), 16, (0.05, 0.25), 2, 4, masks=settings["masks"])
             for method, settings in ssl.METHODS.items()}
    hidden = {method: sum(crop(photo(), np.random.default_rng(seed))["mask"].sum() for seed in range(8))
              for method, crop in crops.items()}
    assert hidden["dino"] == 0 and hidden["ibot"] > 0 and hidden["dinov2"] > 0
    case = make_case()
    case.mask[:] = False
    assert not ssl.METHODS["dino"]["sinkhorn"] and not ssl.METHODS["dino"]["koleo_weight"]
    terms, _ = both_terms(loss_with_centers(case), *as_arguments(case), teacher_temp=0.05)
    cls, _ = reference_loss(**vars(case), teacher_temp=0.05)
    assert sum(terms.values()).item() == pytest.approx(cls.item(), rel=1e-5)


def test_dinov2_s_targets_come_from_sinkhorn_knopp():
    """[CLS] of both crops together, masked tokens together, no centre."""
    case = make_case()
    case.teacher_cls, case.teacher_patch = case.teacher_cls.float(), case.teacher_patch.float()
    dinov2 = ssl.IBOTLoss(K, "cpu", sinkhorn=ssl.METHODS["dinov2"]["sinkhorn"])
    dinov2.centers["cls"] += 100.0  # it must not matter
    student, teacher, weights = as_arguments(case)
    terms, entropies = both_terms(dinov2, student, teacher, weights, teacher_temp=0.05)
    targets = [reference_sinkhorn(x, 0.05) for x in teacher]
    case.teacher_cls = targets[0].log().mul(0.05).unflatten(0, (2, 3))  # whose softmax they are
    order = case.mask.flatten().nonzero()[:, 0]
    case.teacher_patch = torch.zeros(2 * 3 * 9, K, dtype=torch.float64).index_put((order,), targets[1].log().mul(0.05))
    case.teacher_patch = case.teacher_patch.view(2, 3, 9, K)
    case.center_cls = case.center_patch = torch.zeros(K)
    expected = reference_loss(**vars(case), teacher_temp=0.05)
    assert terms["cls"].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert terms["mim"].item() == pytest.approx(expected[1].item(), rel=1e-4)
    assert entropies["batch_entropy"] > 0.95 * math.log(K), "every prototype gets as much"


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


def test_teacher_temperature_rises_linearly_and_stays():
    """0.04 at the start, 0.07 from epoch 30 on, as in iBOT; without warm-up 0.07 at once."""
    schedule = [ssl.teacher_temperature(epoch, 30, 0.04, 0.07) for epoch in (0, 15, 30, 45, 50)]
    assert schedule == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert ssl.teacher_temperature(0, 0.0, 0.04, 0.07) == 0.07


# ----------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("grid", [4, 7, 14])
def test_block_mask_never_hides_more_than_its_share(grid):
    """BEiT's budget is a limit; the MIM loss is about what can be inferred from the rest."""
    rng = np.random.default_rng(0)
    for ratio in np.linspace(0, 0.6, 60):
        mask = ssl.block_mask(grid, grid, ratio, rng)
        assert mask.shape == (grid, grid) and mask.dtype == bool
        assert mask.sum() <= ratio * grid * grid


def test_block_mask_comes_near_its_share():
    """14 × 14 is the output grid of a 224 px crop at p = 8 with staged compression. A mask may fall a bit short."""
    rng = np.random.default_rng(0)
    for ratio in (0.1, 0.3, 0.5):
        mean = np.mean([ssl.block_mask(14, 14, ratio, rng).mean() for _ in range(200)])
        assert 0.85 * ratio < mean <= ratio


def test_half_the_views_are_unmasked_and_the_others_spread_over_the_range():
    """0, or uniform in 0.3 ± 0.2, half of the time each."""
    rng = np.random.default_rng(0)
    crops = ssl.MultiCrop(14, (0.25, 1.0), 14, (0.05, 0.25), 0, output_patch=1)
    shares = np.array([crops(photo(20, 20), rng)["mask"].mean((1, 2)) for _ in range(500)]).flatten()
    masked = shares[shares > 0]
    assert 0.45 < len(masked) / len(shares) < 0.55
    assert masked.max() <= 0.5 and 0.25 < masked.mean() < 0.31
    assert masked.min() < 0.14 and np.quantile(masked, 0.9) > 0.4 and 0.08 < masked.std() < 0.14  # uniform: 0.115


def test_masks_are_blocks_and_not_scattered_dots():
    """A lone hidden token can be read off its neighbours; of a block it can't. Random dots would have hidden neighbours
    as often as the ratio says, 0.3; blocks far more often."""
    rng = np.random.default_rng(0)
    neighbours = []
    for _ in range(200):
        mask = ssl.block_mask(14, 14, 0.3, rng)
        neighbours += [mask[:, 1:][mask[:, :-1]].mean(), mask[1:][mask[:-1]].mean()]
    assert np.mean(neighbours) > 0.75


@pytest.mark.parametrize("grid, pieces", [(14, 1.33), (28, 1.17)])
def test_masks_have_as_few_pieces_as_ibot_s(grid, pieces):
    """Connected pieces a mask, over 10,000 draws of iBOT's loader, here over 2,500."""
    rng = np.random.default_rng(0)
    masks = [ssl.block_mask(grid, grid, rng.uniform(0.1, 0.5), rng) for _ in range(2500)]
    assert np.mean([scipy.ndimage.label(mask)[1] for mask in masks]) == pytest.approx(pieces, rel=0.03)


def test_every_token_is_hidden_about_as_often_as_any_other():
    """Blocks may touch the borders: a mask that spares them would train the centre alone."""
    rng = np.random.default_rng(0)
    often = np.mean([ssl.block_mask(14, 14, 0.3, rng) for _ in range(500)], axis=0)
    assert often.min() > 0.005 and often.max() < 0.65  # iBOT's blocks overlap, so the centre is hidden most
    for turned in (often[::-1], often[:, ::-1], often.T):  # and no side is preferred
        assert np.abs(often - turned).max() < 0.15


# ----------------------------------------------------------------------------------------------------------------------
# Crops and augmentation


def coordinates(width, height):
    """An image whose red is x and whose green is y, one level per pixel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


def box_of(crop):
    """(left, top, w, h, flipped) of a crop of such an image, from straight lines through its inner pixels."""
    pixels, size = crop.astype(float), len(crop)
    inner = np.arange(size // 4, size - size // 4)
    x_slope, x_start = np.polyfit(inner + 0.5, pixels[:, :, 0].mean(0)[inner] + 0.5, 1)
    y_slope, y_start = np.polyfit(inner + 0.5, pixels[:, :, 1].mean(1)[inner] + 0.5, 1)
    flipped = x_slope < 0
    w, h = abs(x_slope) * size, y_slope * size
    return (x_start - w if flipped else x_start), y_start, w, h, flipped


@pytest.mark.parametrize("scale", [(0.25, 1.0), (0.05, 0.25)])
def test_crops_cover_the_area_and_aspect_that_they_should(scale):
    """The box is recovered from the pixels: a share of the area in `scale`, aspect 3/4 to 4/3, inside the image, and
    the whole range of each is used; flipped half of the time."""
    image, rng = coordinates(250, 200), np.random.default_rng(0)
    left, top, w, h, flipped = np.array([box_of(ssl.random_resized_crop(image, 64, scale, rng)) for _ in range(400)]).T
    slack = 1.5  # pixels: the box has whole numbers, and pixels have eight bits
    assert left.min() > -slack and top.min() > -slack
    assert (left + w).max() < 250 + slack and (top + h).max() < 200 + slack
    area, aspect = w * h / (250 * 200), w / h
    assert area.min() > scale[0] * 0.95 and area.max() < scale[1] * 1.05
    assert area.min() < scale[0] + 0.1 * (scale[1] - scale[0]) and area.max() > scale[1] - 0.25 * (scale[1] - scale[0])
    assert aspect.min() > 3 / 4 * 0.95 and aspect.max() < 4 / 3 * 1.05
    assert aspect.min() < 0.82 and aspect.max() > 1.22 and abs(np.log(aspect).mean()) < 0.08
    assert 0.4 < flipped.mean() < 0.6
    assert left.min() < 5 and top.min() < 5 and (left + w).max() > 245 and (top + h).max() > 195  # no corner is spared


def test_crop_of_a_very_long_image_keeps_its_aspect():
    """Ten tries find no box in a ribbon; what is taken then is its centre, not a squeezed whole."""
    left, top, w, h, _ = box_of(ssl.random_resized_crop(coordinates(250, 20), 32, (0.9, 1.0), np.random.default_rng(0)))
    assert h == pytest.approx(20, abs=0.5) and w / h == pytest.approx(4 / 3, rel=0.05)
    assert left + w / 2 == pytest.approx(125, abs=1)


class Fixed:
    """An rng whose every uniform() is the same way along its range, and whose permutation() is given."""

    def __init__(self, share, order):
        self.share, self.order = share, order

    def uniform(self, low, high):
        return low + self.share * (high - low)

    def permutation(self, _):
        return self.order


def photo(width=48, height=40):
    """Smooth colours with some detail, all hues, dark and bright."""
    y, x = np.mgrid[:height, :width] / 10
    waves = np.stack([np.sin(x), np.sin(y + 1), np.sin(x + 2 * y)], axis=2)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return (127 + 120 * waves + noise).clip(0, 255).astype(np.uint8)


def planes(pixels):
    """As colours are changed: float32 (3, H, W), 0 to 255."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def difference(image, expected):
    """Mean absolute difference, in levels of 255, of planes and of a Pillow image or pixels."""
    return np.abs(image.transpose(1, 2, 0) - np.asarray(expected, float)).mean()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_color_jitter_equals_torchvision(share, order):
    """Brightness, contrast, saturation and hue by the same factors, in the same order. On torchvision's floats the
    arithmetic is the same, but for the hue's whole numbers; Pillow's cuts off to 8 bits after every change."""
    def factor(strength, middle=1):
        return middle - strength + share * 2 * strength

    theirs = [lambda image: torchvision.adjust_brightness(image, factor(0.4)),
              lambda image: torchvision.adjust_contrast(image, factor(0.4)),
              lambda image: torchvision.adjust_saturation(image, factor(0.2)),
              lambda image: torchvision.adjust_hue(image, factor(0.1, middle=0))]
    exact, pillow = torch.from_numpy(planes(photo())) / 255, Image.fromarray(photo())
    for k in order:
        exact, pillow = theirs[k](exact), theirs[k](pillow)
    ours = planes(photo())
    ssl.color_jitter(ours, Fixed(share, order))
    assert ours.dtype == np.float32 and ours.min() >= 0 and ours.max() <= 255
    assert np.abs(ours - exact.numpy() * 255).max() < 2 and np.abs(ours - exact.numpy() * 255).mean() < 0.4
    assert difference(ours, pillow) <= 2
    assert difference(ours, photo()) > 5, "and it does change the image"


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.013, 0.0, 0.07, 0.1, 1 / 3, 0.5])
def test_hue_equals_colorsys(turn):
    """To the nearest level, for every kind of colour: any of the channels highest, two or all of them equal, black and
    white. Hue is a circle: it wraps around at both ends and does not stop there."""
    some = np.random.default_rng(0).integers(0, 256, (300, 3))
    ties = np.array([[r, g, b] for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)])
    colours = np.concatenate([some, ties])
    expected = []
    for colour in colours / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    image = planes(colours[None])
    ssl.shift_hue(image, turn)
    np.testing.assert_allclose(image[:, 0].T, np.array(expected) * 255, atol=0.501)


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.013, 0.0, 0.07, 0.1, 0.5])
def test_hue_is_near_pillow_s(turn):
    """Pillow's HSV has 8 bits and is off by a level itself, even where nothing is turned."""
    image = planes(photo())
    ssl.shift_hue(image, turn)
    assert difference(image, torchvision.adjust_hue(Image.fromarray(photo()), turn)) <= 2


def test_grey_and_solarize_equal_pillow():
    """Each alone, forced by what random() gives: a change happens where that is below its probability."""
    def changed(*draws):
        return ssl.augment(photo(), SimpleNamespace(random=iter(draws).__next__), 0.5, 0.2, 1.0)

    assert np.array_equal(changed(0.9, 0.9, 0.9, 0.9), photo())
    grey = np.asarray(Image.fromarray(photo()).convert("L"), int)
    assert np.abs(changed(0.9, 0.1, 0.9, 0.9) - grey[:, :, None]).max() <= 1
    assert np.array_equal(changed(0.9, 0.9, 0.9, 0.1), np.asarray(ImageOps.solarize(Image.fromarray(photo()), 128)))


def plain_view(image, rng, size, scale, blur, solarize):
    """A view of a Pillow image by torchvision and Pillow alone, with the same random draws as ours."""
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            break
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    image = torchvision.resized_crop(image, top, left, h, w, [size, size], torchvision.InterpolationMode.BICUBIC)
    image = torchvision.hflip(image) if rng.random() < 0.5 else image
    if rng.random() < 0.8:
        changes = [(torchvision.adjust_brightness, 0.6, 1.4), (torchvision.adjust_contrast, 0.6, 1.4),
                   (torchvision.adjust_saturation, 0.8, 1.2), (torchvision.adjust_hue, -0.1, 0.1)]
        for k in rng.permutation(4):
            change, low, high = changes[k]
            image = change(image, rng.uniform(low, high))
    image = torchvision.rgb_to_grayscale(image, 3) if rng.random() < 0.2 else image
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0))) if rng.random() < blur else image
    return np.asarray(torchvision.solarize(image, 128) if rng.random() < solarize else image)


@pytest.mark.parametrize("size, scale, blur, solarize", [(48, (0.25, 1.0), 1.0, 0.0), (48, (0.25, 1.0), 0.1, 0.2),
                                                         (32, (0.05, 0.25), 0.5, 0.0)])
def test_views_are_near_torchvision_s(size, scale, blur, solarize):
    """The whole of iBOT's recipe: with the same random draws, views that differ by less than what 8 bits hide."""
    differences = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ours = ssl.augment(ssl.random_resized_crop(photo(200, 150), size, scale, rng), rng, blur, solarize, 1.0)
        plain = plain_view(Image.fromarray(photo(200, 150)), np.random.default_rng(seed), size, scale, blur, solarize)
        assert ours.shape == plain.shape == (size, size, 3) and ours.dtype == np.uint8
        differences.append(np.abs(ours - plain.astype(float)).mean())
    assert np.mean(differences) <= 2 and np.max(differences) <= 3


@pytest.mark.parametrize("global_scale, local_scale", [((0.25, 1.0), (0.2, 0.25)), ((0.4, 1.0), (0.05, 0.25))])
def test_short_side_is_what_the_smallest_crop_needs(global_scale, local_scale, monkeypatch):
    """An image whose shorter side has that many pixels has enough for every crop; a square one can't do with less."""
    crops, enlargements = ssl.MultiCrop(32, global_scale, 16, local_scale, 8, 8), []

    def resize(crop, size):
        enlargements.append(size / min(crop.shape[:2]))
        return np.zeros((size, size, 3), np.uint8)

    def largest_enlargement(height, width):
        enlargements.clear()
        rng = np.random.default_rng(0)
        for _ in range(60):
            crops(np.zeros((round(height), round(width), 3), np.uint8), rng)
        assert len(enlargements) == 60 * 10
        return max(enlargements)

    monkeypatch.setattr(ssl.data, "resize", resize)
    side = crops.short_side
    assert 0.9 < largest_enlargement(side, side) <= 1 < largest_enlargement(0.8 * side, 0.8 * side)
    assert largest_enlargement(side, 1.5 * side) <= 1 and largest_enlargement(2.3 * side, side) <= 1


def test_views_depend_on_the_rng_alone():
    """A run that is resumed, or has other workers, must see the same crops and masks."""
    crops = ssl.MultiCrop(32, (0.25, 1.0), 16, (0.05, 0.25), 3, 8)
    first, again, other = (crops(photo(), np.random.default_rng(seed)) for seed in (5, 5, 6))
    for name in first:
        assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first["global_crops"], other["global_crops"])
    assert {name: (x.shape, x.dtype) for name, x in first.items()} == {
        "global_crops": ((2, 32, 32, 3), np.uint8), "local_crops": ((3, 16, 16, 3), np.uint8),
        "mask": ((2, 4, 4), bool)}
    assert not np.array_equal(first["local_crops"][0], first["local_crops"][1])


def test_how_often_each_augmentation_happens():
    """Grey 0.2, solarize 0.2 on the second global crop only, blur always on the first and rarely on the second. A flat
    white image shows solarization (white turns black), coloured noise shows grey and blur."""
    rng, count = np.random.default_rng(0), 500
    crops = ssl.MultiCrop(16, (0.25, 1.0), 16, (0.05, 0.25), 1, 8)
    white = [crops(np.full((32, 32, 3), 255, np.uint8), rng) for _ in range(count)]
    dark = np.array([[views["global_crops"][q].mean() < 100 for q in (0, 1)] + [views["local_crops"].mean() < 100]
                     for views in white]).mean(0)
    assert dark[0] == 0 and dark[2] == 0 and 0.14 < dark[1] < 0.26

    noise = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def rates(blur):
        images = [ssl.augment(noise, rng, blur, 0.0, 1.0).astype(float) for _ in range(count)]
        grey = np.mean([np.ptp(image, axis=2).max() == 0 for image in images])
        return grey, np.mean([np.abs(np.diff(image, axis=1)).mean() for image in images])

    (grey, sharp), (_, rare), (_, blurred) = rates(0.0), rates(0.1), rates(1.0)
    assert 0.14 < grey < 0.26
    assert blurred < 0.6 * sharp and blurred < rare < sharp
