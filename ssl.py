"""Self-supervision (Sec. 3.4): iBOT, trained jointly with the reconstruction, and Table 6's DINO and DINOv2.

iBOT in a paragraph: the teacher, a moving average of the student, sees two global crops of an image and turns [CLS] and
every token into a distribution over K prototypes. The student sees the same crops with blocks of tokens masked, and
several small local crops. It has to predict the teacher's [CLS] of each global crop from every *other* crop, L_[CLS],
and the teacher's tokens where its own are masked, L_MIM. So tokens come to say what an image shows.

    IBOTLoss                     L_iBOT = L_[CLS] + L_MIM (Eq. 4); METHODS: in what DINO and DINOv2 differ
    block_mask, random_mask      which tokens are masked
    MultiCrop, collate_crops     one image -> its crops and masks; a batch of them
    random_resized_crop, augment, …    pixel arithmetic

Nothing here has parameters: the heads are in model.py. This file shadows the standard library's `ssl`. It therefore
executes the real one in its own namespace first, and imports numpy, Pillow and torch lazily, so that `import ssl`, in
urllib or pip too, gives the TLS module as ever, even where those packages are not installed.
"""
import importlib
import math
import sysconfig
from importlib.machinery import PathFinder

_doc = __doc__
exec(PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")]).loader.get_code("ssl"))  # see the last paragraph above
__doc__ = _doc


class _Later:
    """A module that is imported at its first use."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("__"):  # inspect and doctest ask every object for these
            raise AttributeError(attribute)
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # from now on found without coming here
        return value


np, torch, data = _Later("numpy"), _Later("torch"), _Later("data")
Image, ImageFilter = _Later("PIL.Image"), _Later("PIL.ImageFilter")

# ----------------------------------------------------------------------------------------------------------------------
# The loss (Eq. 4)

METHODS = {  # Table 6, right. masks: L_MIM too; untied: patches have a head of their own; sinkhorn: instead of centring
    "dino": dict(masks=False, untied=False, sinkhorn=False, koleo_weight=0.0),
    "ibot": dict(masks=True, untied=False, sinkhorn=False, koleo_weight=0.0),
    "dinov2": dict(masks=True, untied=True, sinkhorn=True, koleo_weight=0.1),
}


class IBOTLoss:
    """L_iBOT = L_[CLS] + L_MIM: cross-entropies between softmax((teacher - centre) / τ_t) and softmax(student / τ_s).

    The centre is a moving average of the teacher's logits over the global batch: subtracting it keeps one prototype
    from winning every image, and the low temperature τ_t keeps the output from becoming uniform. There are two, (K,)
    each: for [CLS], and for masked patches (iBOT takes all patches; here only the masked ones' logits exist).

    DINOv2 takes its targets from `sinkhorn_knopp` instead, without a centre.
    """

    def __init__(self, prototypes, device, student_temp=0.1, center_momentum=0.9, sinkhorn=False,
                 sum_over_processes=lambda x: x):
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.sinkhorn, self.sum_over_processes = sinkhorn, sum_over_processes
        self.centers = {"cls": torch.zeros(prototypes, device=device), "patch": torch.zeros(prototypes, device=device)}
        self.batch_sums = {}

    def cls_loss(self, student, teacher, teacher_temp):
        """L_[CLS]. student: logits ((2 + L) B, K), crop by crop, the two global ones first; teacher: logits (2 B, K) ->
        the loss, and {name: entropy in nats} of the teacher's output, for the log."""
        target = self.target("cls", teacher, teacher_temp)  # (2 B, K)
        batch = len(teacher) // 2
        log_student = (student.float() / self.student_temp).log_softmax(-1)
        loss, pairs = 0, 0
        for q, teacher_probs in enumerate(target.split(batch)):  # (B, K)
            for v, student_log_probs in enumerate(log_student.split(batch)):  # (B, K)
                if v != q:
                    loss = loss - (teacher_probs * student_log_probs).sum(-1).mean()
                    pairs += 1
        return loss / pairs, {"teacher_entropy": entropy(target).mean(), "batch_entropy": entropy(target.mean(0))}

    def mim_loss(self, student, teacher, mask_weight, teacher_temp):
        """L_MIM: the same crop, v = q, at the masked tokens. student, teacher: logits (P, K); mask_weight (P,) from
        collate_crops makes the sum over tokens a mean over each crop's masked tokens, then over crops."""
        target = self.target("patch", teacher, teacher_temp)  # (P, K)
        log_student = (student.float() / self.student_temp).log_softmax(-1)
        return -(mask_weight * (target * log_student).sum(-1)).sum()

    def target(self, name, logits, temperature):
        """The teacher's distributions over the prototypes, (N, K); rows sum to 1. name: "cls" or "patch"."""
        logits = logits.float()
        if self.sinkhorn:
            return sinkhorn_knopp(logits, temperature, self.sum_over_processes)
        total = torch.cat([logits.sum(0), logits.new_full((1,), len(logits))])  # (K + 1,), the last: how many
        self.batch_sums[name] = self.batch_sums.get(name, 0) + total
        return ((logits - self.centers[name]) / temperature).softmax(-1)

    def update_centers(self):
        """Once per step, after all its micro-batches: centre <- 0.9 centre + 0.1 mean of the global batch."""
        for name, total in self.batch_sums.items():
            logits, count = self.sum_over_processes(total).split([len(total) - 1, 1])
            mean = torch.where(count > 0, logits / count.clamp(min=1), self.centers[name])  # count 0: nothing masked
            self.centers[name].lerp_(mean, 1 - self.center_momentum)
        self.batch_sums = {}


def entropy(p):
    """Of distributions (…, K), in nats."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def sinkhorn_knopp(logits, temperature, sum_over_processes, iterations=3):
    """DINOv2's replacement for centring: soft assignments (N, K) of all processes' samples in which all prototypes get
    the same share, exp(logits / temperature) with columns and rows divided by their sums in turn. Rows sum to 1."""
    q = ((logits - 1) / temperature).exp()  # logits are cosines, at most 1; a factor that all share cancels
    for _ in range(iterations):
        q = q / sum_over_processes(q.sum(0)).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True)
    return q


def koleo(x):
    """-mean log of the distance to the nearest other row, of rows scaled to length 1, (N, D): it spreads them out
    (DINOv2's regulariser; Sablayrolles et al. 2019)."""
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    nearest = (x @ x.T).detach().fill_diagonal_(-1).argmax(1)
    return -(torch.nn.functional.pairwise_distance(x, x[nearest]) + 1e-8).log().mean()


def teacher_temperature(epoch, warmup_epochs, start, end):
    """τ_t: linear from `start` to `end` over the first `warmup_epochs`, however long the training (iBOT)."""
    return start + (end - start) * min(1.0, epoch / warmup_epochs) if warmup_epochs else end


# ----------------------------------------------------------------------------------------------------------------------
# Masks, on the encoder's *output* grid: with staged compression every output token is wholly masked or wholly visible


def block_mask(height, width, ratio, rng):
    """A mask (height, width), True = hidden, made of rectangles until about `ratio` of it is hidden, never more (BEiT).

    Rectangles have an aspect of 0.3 to 1/0.3 and cover at least (min(height, width) // 3)² tokens. If less than that is
    left, the area is drawn between the remainder and the minimum (iBOT): such a block fits only if it overlaps what is
    masked already, so a mask stays in few pieces.
    """
    mask, wanted = np.zeros((height, width), bool), ratio * height * width
    smallest = (min(height, width) // 3) ** 2
    failures = 0
    while mask.sum() < wanted and failures < 10:
        left_to_hide = wanted - mask.sum()
        area = rng.uniform(*sorted((smallest, left_to_hide)))
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        failures += 1
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        block = mask[top:top + h, left:left + w]
        if 0 < block.size - block.sum() <= left_to_hide:
            block[:] = True
            failures = 0
    return mask


def random_mask(grid, rng, mean=0.3, spread=0.2):
    """A block mask (grid, grid) that hides nothing half of the time, else a share uniform in mean ± spread."""
    return block_mask(grid, grid, rng.uniform(mean - spread, mean + spread) if rng.random() < 0.5 else 0.0, rng)


# ----------------------------------------------------------------------------------------------------------------------
# Crops (iBOT's recipe, which is DINO's too; Appendix A takes each method's own: runs/tables.py has DINOv2's)


class MultiCrop:
    """An image, uint8 (H, W, 3), and an rng -> {"global_crops": uint8 (2, g, g, 3), "local_crops": uint8 (L, l, l, 3),
    "mask": bool (2, h, h)}, with h = global_size / output_patch."""

    def __init__(self, global_size, global_scale, local_size, local_scale, local_crops, output_patch, masks=True):
        self.global_size, self.global_scale = global_size, global_scale
        self.local_size, self.local_scale, self.local_crops = local_size, local_scale, local_crops
        self.mask_grid, self.masks = global_size // output_patch, masks
        self.blur_scale = global_size / 224  # iBOT's radii are for 224 px: a small image is blurred less
        # the smallest short side for which no crop is upsampled: worst case is area scale[0] and aspect 3/4
        self.short_side = math.ceil(max(size / math.sqrt(scale[0] * 3 / 4) for size, scale in
                                        [(global_size, global_scale), (local_size, local_scale)]))

    def __call__(self, pixels, rng):
        def crop(size, scale, blur, solarize):
            return augment(random_resized_crop(pixels, size, scale, rng), rng, blur, solarize, self.blur_scale)
        local_crops = [crop(self.local_size, self.local_scale, 0.5, 0.0) for _ in range(self.local_crops)]
        return {
            "global_crops": np.stack([crop(self.global_size, self.global_scale, 1.0, 0.0),
                                      crop(self.global_size, self.global_scale, 0.1, 0.2)]),
            "local_crops": np.array(local_crops, np.uint8).reshape(-1, self.local_size, self.local_size, 3),
            "mask": np.stack([random_mask(self.mask_grid, rng) if self.masks else
                              np.zeros((self.mask_grid, self.mask_grid), bool) for _ in range(2)]),
        }


def collate_crops(views):
    """Collated views, (B, crops, …) each -> crop by crop, as JointTokenizer.forward takes them.

    {"global_crops": (2 B, g, g, 3), "local_crops": (L B, l, l, 3), "mask": (2 B, h, h), "masked_index": (P,) of the
    masked tokens among all 2 B h h, "mask_weight": (P,): all masked tokens of one crop share 1 / (2 B)}. Computed in
    the loading worker, because nonzero() on a GPU would force a synchronisation.
    """
    views = {name: batch.transpose(0, 1).flatten(0, 1) for name, batch in views.items()}
    tokens = views["mask"].flatten(1)  # (2 B, h h)
    counts = tokens.sum(1)
    shares = 1 / (counts * len(counts)).clamp(min=1)
    return {**views, "masked_index": tokens.flatten().nonzero()[:, 0], "mask_weight": shares.repeat_interleave(counts)}


# ----------------------------------------------------------------------------------------------------------------------
# Pixel arithmetic. While its colours change, an image is float32 (3, H, W), 0 to 255, and changes in place: allocating
# new memory would take longer than the arithmetic


def random_resized_crop(pixels, size, scale, rng):
    """A random part of an image, uint8 (H, W, 3): `scale` (low, high) of its area, aspect 3/4 to 4/3, resized to
    (size, size, 3) and flipped half the time."""
    height, width, _ = pixels.shape
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:  # an extreme aspect ratio: the largest valid centre crop
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    crop = data.resize(pixels[top:top + h, left:left + w], size)
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def grey(image):
    """Brightness as the eye has it (ITU-R 601), (H, W)."""
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def mix(image, other, factor):
    """image <- factor * image + (1 - factor) * other. A factor above 1 leads away from the other image."""
    image *= factor
    image += (1 - factor) * other
    np.clip(image, 0, 255, out=image)


def shift_hue(image, turn):
    """Hue, as HSV has it, turned by a fraction of the circle, -0.5 to 0.5.

    The circle has six steps, with red at 0, green at 2 and blue at 4. A channel has the pixel's highest value up to one
    step from its own place, the lowest from two steps on, and in between it falls evenly. Everything is counted in
    steps times (highest - lowest): so nothing is divided, and grey is no special case. Whole numbers of 16 bits are
    faster here than floats.
    """
    red, green, blue = whole = np.rint(image, out=image).astype(np.int16)
    lowest, highest = whole.min(0), whole.max(0)
    step = highest - lowest
    two, circle = 2 * step, 6 * step
    is_red = red == highest
    is_green = (green == highest) & ~is_red
    is_blue = ~(is_red | is_green)
    hue = is_red * (green - blue) + is_green * (blue - red + two) + is_blue * (red - green + 2 * two)
    hue += np.rint(np.float32(6 * turn) * step).astype(np.int16)
    for channel in range(3):
        away = np.abs(hue - channel * two)
        away = np.minimum(away, np.abs(circle - away))  # the other way around may be shorter
        image[channel] = lowest + two - np.minimum(np.maximum(away, step), two)


def color_jitter(image, rng, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1):
    """The four changes in random order, each by a random amount."""
    def factor(strength):
        return rng.uniform(1 - strength, 1 + strength)

    changes = [lambda: mix(image, 0, factor(brightness)), lambda: mix(image, grey(image).mean(), factor(contrast)),
               lambda: mix(image, grey(image), factor(saturation)), lambda: shift_hue(image, rng.uniform(-hue, hue))]
    for k in rng.permutation(4):
        changes[k]()


def augment(pixels, rng, blur, solarize, blur_scale):
    """uint8 (H, W, 3) -> the same after colour jitter, grey, blur with probability `blur`, solarize with probability
    `solarize`."""
    image = pixels.transpose(2, 0, 1).astype(np.float32, order="C")  # (3, H, W)
    if rng.random() < 0.8:
        color_jitter(image, rng)
    if rng.random() < 0.2:
        image[:] = grey(image)
    pixels = np.stack(np.rint(image, out=image).astype(np.uint8), axis=-1)  # (H, W, 3)
    if rng.random() < blur:
        radius = rng.uniform(0.1, 2.0) * blur_scale
        pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
    if rng.random() < solarize:
        pixels = np.minimum(pixels, 255 - pixels)  # values from 128 on are inverted
    return pixels
