"""Self-supervision (Sec. 3.4): iBOT, trained jointly with the reconstruction, and Table 6's DINO and DINOv2.

iBOT in a paragraph: the teacher, a moving average of the student, sees two global crops of an image and turns [CLS] and
every token into a distribution over K prototypes. The student sees the same crops with blocks of tokens masked, and
several small local crops. It has to predict the teacher's [CLS] of each global crop from every *other* crop, L_[CLS],
and the teacher's tokens where its own are masked, L_MIM. So tokens learn to say what an image shows.

    IBOTLoss                     L_iBOT = L_[CLS] + L_MIM (Eq. 4); METHODS: how DINO and DINOv2 differ
    block_mask                   which tokens are masked
    MultiCrop, collate_crops     one image -> its crops and masks; then a batch of them, as the networks take it
    random_resized_crop, augment, …    pixel arithmetic

Nothing here has parameters; the heads are in model.py. This file is also Python's own `ssl`, whose name it takes: the
last section, which is not about the method, makes it so.
"""
import math  # np, torch, data, Image, ImageFilter: at the end of the file

# ----------------------------------------------------------------------------------------------------------------------
# The loss (Eq. 4)

METHODS = {  # Table 6, right. masks: also L_MIM; untied: a second head, for patches; sinkhorn: instead of centring
    "dino": dict(masks=False, untied=False, sinkhorn=False, koleo_weight=0.0),
    "ibot": dict(masks=True, untied=False, sinkhorn=False, koleo_weight=0.0),
    "dinov2": dict(masks=True, untied=True, sinkhorn=True, koleo_weight=0.1),
}


class IBOTLoss:
    """L_iBOT = L_[CLS] + L_MIM (Eq. 4): cross-entropies H(teacher, student) of distributions over K prototypes.

    Teacher: softmax((logits - centre) / τ_t). The centre, a moving average of the logits, keeps one prototype from
    winning every image; the low τ_t keeps the output from becoming uniform. There are two centres, (K,): for [CLS] and
    for masked patches (iBOT's is over all patches; here only the masked ones have logits). DINOv2 has none: see
    sinkhorn_knopp. Student: softmax(logits / τ_s).
    """

    def __init__(self, prototypes, device, student_temp=0.1, center_momentum=0.9, sinkhorn=False,
                 sum_over_processes=lambda x: x):
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.sinkhorn, self.sum_over_processes = sinkhorn, sum_over_processes
        self.centers = {"cls": torch.zeros(prototypes, device=device), "patch": torch.zeros(prototypes, device=device)}
        self.batch_sums = {}

    def cls_loss(self, student, teacher, teacher_temp):
        """L_[CLS], the mean over all pairs of a teacher's view q and a student's view v ≠ q of the same image.

        teacher: logits (2 B, K), for B images the first global crops, then the second ones; student: logits
        ((2 + L) B, K), of the same crops and then of L local ones. Also returns, for the log, {name: entropy in nats}.
        """
        target = self.target("cls", teacher, teacher_temp)  # (2 B, K)
        log_student = (student.float() / self.student_temp).log_softmax(-1)
        batch, loss, pairs = len(teacher) // 2, 0, 0
        for q, teacher_probs in enumerate(target.split(batch)):  # q = 0, 1: (B, K)
            for v, student_log_probs in enumerate(log_student.split(batch)):  # v = 0, …, 1 + L: (B, K)
                if v != q:
                    loss = loss - (teacher_probs * student_log_probs).sum(-1).mean()
                    pairs += 1
        return loss / pairs, {"teacher_entropy": entropy(target).mean(), "batch_entropy": entropy(target.mean(0))}

    def mim_loss(self, student, teacher, mask_weight, teacher_temp):
        """L_MIM: the same view, v = q, at the student's masked tokens. student, teacher: their logits (P, K);
        mask_weight (P,) makes it the mean over a crop's masked tokens, then over all 2 B crops; 0 for one without."""
        target = self.target("patch", teacher, teacher_temp)  # (P, K)
        log_student = (student.float() / self.student_temp).log_softmax(-1)
        return -(mask_weight * (target * log_student).sum(-1)).sum()

    def target(self, name, logits, temperature):
        """The teacher's logits (N, K) -> its distributions (N, K), centred and sharpened. Also adds the logits to
        `batch_sums`, for update_centers. name: "cls" or "patch"."""
        logits = logits.float()
        if self.sinkhorn:
            return sinkhorn_knopp(logits, temperature, self.sum_over_processes)
        total = torch.cat([logits.sum(0), logits.new_full((1,), len(logits))])  # (K + 1,); the last is the count
        self.batch_sums[name] = self.batch_sums.get(name, 0) + total
        return ((logits - self.centers[name]) / temperature).softmax(-1)

    def update_centers(self):
        """After all micro-batches of a step: centre <- 0.9 centre + 0.1 mean of the global batch."""
        for name, total in self.batch_sums.items():
            logit_sum, count = self.sum_over_processes(total).split([len(total) - 1, 1])
            mean = torch.where(count > 0, logit_sum / count.clamp(min=1), self.centers[name])  # count 0: nothing masked
            self.centers[name].lerp_(mean, 1 - self.center_momentum)
        self.batch_sums = {}


def entropy(p):
    """The entropy of distributions (…, K), in nats."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def sinkhorn_knopp(logits, temperature, sum_over_processes, iterations=3):
    """DINOv2's replacement for centring: divides the columns and the rows of exp(logits / temperature), (N, K), by
    their sums in turn. Rows then sum to 1, and each prototype gets about the same share of all processes' samples."""
    q = ((logits - 1) / temperature).exp()  # logits are at most 1, so nothing overflows; the factor cancels
    for _ in range(iterations):
        q = q / sum_over_processes(q.sum(0)).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True)
    return q


def koleo(x):
    """DINOv2's regulariser, which spreads out the rows of x (N, D): minus the mean log of each row's distance to its
    nearest neighbour, all scaled to length 1 (Sablayrolles et al. 2019)."""
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    nearest = (x @ x.T).detach().fill_diagonal_(-1).argmax(1)
    return -(torch.nn.functional.pairwise_distance(x, x[nearest]) + 1e-8).log().mean()


def teacher_temperature(epoch, warmup_epochs, start, end):
    """τ_t: linear from `start` to `end` over the first `warmup_epochs`, however long the training (iBOT)."""
    return start + (end - start) * min(1.0, epoch / warmup_epochs) if warmup_epochs else end


# ----------------------------------------------------------------------------------------------------------------------
# Masks and crops, by iBOT's recipe (Appendix A gives each method its own; DINOv2's numbers are in runs/tables.py)


def block_mask(height, width, ratio, rng):
    """A mask (height, width), True = hidden. Adds rectangles until about `ratio` of it is hidden, never more (BEiT).

    Rectangles have an aspect of 0.3 to 1/0.3 and at least (min(height, width) // 3)² tokens. If less than that is left
    to hide, the area is drawn between what is left and that minimum (iBOT): such a block fits only where it overlaps
    others, so masks stay in few pieces.
    """
    mask, wanted = np.zeros((height, width), bool), ratio * height * width
    smallest = (min(height, width) // 3) ** 2
    hidden = failures = 0
    while hidden < wanted and failures < 10:
        area = rng.uniform(*sorted((smallest, wanted - hidden)))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1  # unless this block fits
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            block = mask[top:top + h, left:left + w]
            more = block.size - np.count_nonzero(block)
            if 0 < more <= wanted - hidden:
                block[:] = True
                hidden += more
                failures = 0
    return mask


class MultiCrop:
    """An image, uint8 (H, W, 3), and an rng -> {"global_crops": uint8 (2, g, g, 3), "local_crops": uint8 (L, l, l, 3),
    "mask": bool (2, h, h)}. Masks are drawn on the encoder's *output* grid, h = g / output_patch. Each crop is a random
    part of the image, resized and flipped at random, then changed in colour (probability 0.8), grey (0.2), blurred and
    solarized with the probabilities below."""

    def __init__(self, global_size, global_scale, local_size, local_scale, local_crops, output_patch, masks=True):
        self.global_size, self.global_scale = global_size, global_scale
        self.local_size, self.local_scale, self.local_crops = local_size, local_scale, local_crops
        self.mask_grid, self.masks = global_size // output_patch, masks
        self.blur_scale = global_size / 224  # iBOT's radii are for 224 px; smaller crops are blurred less
        # The smallest short side of an image for which no crop is upsampled; the worst is area scale[0], aspect 3/4.
        crops = [(global_size, global_scale)] + ([(local_size, local_scale)] if local_crops else [])
        self.short_side = math.ceil(max(size / math.sqrt(scale[0] * 3 / 4) for size, scale in crops))

    def __call__(self, pixels, rng):
        def crop(size, scale, blur, solarize):
            return augment(random_resized_crop(pixels, size, scale, rng), rng, blur, solarize, self.blur_scale)

        def mask():  # half of the time it hides nothing, else 10 to 50 % of the tokens
            ratio = rng.uniform(0.1, 0.5) if self.masks and rng.random() < 0.5 else 0.0
            return block_mask(self.mask_grid, self.mask_grid, ratio, rng)

        local_crops = [crop(self.local_size, self.local_scale, 0.5, 0.0) for _ in range(self.local_crops)]
        return {
            "global_crops": np.stack([crop(self.global_size, self.global_scale, 1.0, 0.0),
                                      crop(self.global_size, self.global_scale, 0.1, 0.2)]),
            "local_crops": np.array(local_crops, np.uint8).reshape(-1, self.local_size, self.local_size, 3),
            "mask": np.stack([mask(), mask()]),
        }


def collate_crops(views):
    """MultiCrop's views of B images, stacked to (B, crops, …), -> the order in which the networks take them, crop by
    crop: the first crop of every image, then the second of every image, …

    {"global_crops": (2 B, g, g, 3), "local_crops": (L B, l, l, 3), "mask": (2 B, h, h), "masked_index": (P,), the
    masked tokens' numbers among all 2 B h h, "mask_weight": (P,), 1 / (2 B · masked tokens of the crop)}. The index is
    made here, in the loading worker, since nonzero() on a GPU would synchronise.
    """
    views = {name: batch.transpose(0, 1).flatten(0, 1) for name, batch in views.items()}
    masked = views["mask"].flatten(1)  # (2 B, h h), True = hidden
    counts = masked.sum(1)
    weights = 1 / (counts * len(counts)).clamp(min=1)  # (2 B,): of each masked token in a crop
    views["masked_index"] = masked.flatten().nonzero()[:, 0]  # crop by crop, so weight k comes counts[k] times
    views["mask_weight"] = weights.repeat_interleave(counts)
    return views


# ----------------------------------------------------------------------------------------------------------------------
# Pixel arithmetic. Colours change in place, as float32 (3, H, W) from 0 to 255: allocating memory would take longer
# than the arithmetic


def random_resized_crop(pixels, size, scale, rng):
    """A random part of an image, uint8 (H, W, 3), resized to (size, size, 3) and flipped half of the time. `scale`
    (low, high): its share of the area; its aspect is 3/4 to 4/3."""
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
    """Brightness, (H, W), with the weights of ITU-R 601."""
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def mix(image, other, factor):
    """image <- factor · image + (1 - factor) · other. A factor above 1 leads away from the other."""
    image *= factor
    image += (1 - factor) * other
    np.clip(image, 0, 255, out=image)


def shift_hue(image, turn):
    """Turns the hue of HSV by a fraction of the colour circle, -0.5 to 0.5.

    The circle has six steps, with red at 0, green at 2 and blue at 4. A channel has the pixel's highest value up to one
    step from its own place, the lowest value from two steps on, and falls linearly in between. All positions are scaled
    by highest - lowest: this avoids divisions and a special case for grey, and 16-bit integers, which are faster, do.
    """
    red, green, blue = whole = np.rint(image, out=image).astype(np.int16)
    lowest, highest = whole.min(0), whole.max(0)
    step = highest - lowest
    two, circle = 2 * step, 6 * step
    # A pixel's hue is the place of its highest channel, moved towards the second highest. (np.where would be slower.)
    is_red = red == highest
    is_green = (green == highest) & ~is_red
    is_blue = ~(is_red | is_green)
    hue = is_red * (green - blue) + is_green * (two + blue - red) + is_blue * (2 * two + red - green)
    hue += np.rint(np.float32(6 * turn) * step).astype(np.int16)
    for channel in range(3):
        distance = np.abs(hue - channel * two)
        distance = np.minimum(distance, np.abs(circle - distance))  # the other way around may be shorter
        image[channel] = lowest + two - np.minimum(np.maximum(distance, step), two)


def color_jitter(image, rng, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1):
    """Brightness, contrast, saturation and hue change by random amounts, in random order."""
    def factor(strength):
        return rng.uniform(1 - strength, 1 + strength)

    changes = [lambda: mix(image, 0, factor(brightness)), lambda: mix(image, grey(image).mean(), factor(contrast)),
               lambda: mix(image, grey(image), factor(saturation)), lambda: shift_hue(image, rng.uniform(-hue, hue))]
    for k in rng.permutation(4):
        changes[k]()


def augment(pixels, rng, blur, solarize, blur_scale):
    """Colour jitter, grey, blur and solarization of uint8 (H, W, 3), each with its probability."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Not about the method: in this folder `import ssl` finds this file instead of Python's TLS module, for urllib and pip,
# too. So it also runs that module's code, in its own namespace, and imports the method's packages only at their first
# use: `import ssl` must work where they are not installed.
import importlib
import sysconfig
from importlib.machinery import PathFinder

_doc = __doc__
if "SSLContext" not in globals():  # else runtime.py adds this file to a TLS module that was there before
    exec(PathFinder.find_spec("ssl", [sysconfig.get_path("stdlib")]).loader.get_code("ssl"))
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
