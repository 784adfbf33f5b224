"""What bench.py and tables.py measure beside ours: the same views of an image in torchvision, and DC-AE."""
import numpy as np
from PIL import ImageFilter
from torchvision import transforms as T

import runtime
import train_tokenizer as stage1


def torchvision_views():
    """stage1.Views in torchvision's transforms, with iBOT's own blur: a Pillow image -> a list of tensors."""
    bicubic, to_tensor = T.InterpolationMode.BICUBIC, (T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3))
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2))))

    def view(size, scale, blurred, solarized):
        return T.Compose([T.RandomResizedCrop(size, scale, interpolation=bicubic), T.RandomHorizontalFlip(),
                          T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
                          T.RandomApply([blur], blurred), T.RandomSolarize(128, solarized), *to_tensor])

    size, scale = stage1.global_crop_size, stage1.global_crop_scale
    views = [view(size, scale, 1, 0), view(size, scale, 0.1, 0.2), T.Compose([
        T.Resize(stage1.image_size, bicubic), T.RandomCrop(stage1.image_size), T.RandomHorizontalFlip(), *to_tensor])]
    views += [view(stage1.local_crop_size, stage1.local_crop_scale, 0.5, 0)] * stage1.local_crops
    return lambda image: [view(image) for view in views]


def dc_ae():
    """DC-AE f32c32, untrained."""
    try:
        from runs.tokenizers.dc_ae import ARCHITECTURE, DCAE, AutoencoderDC
    except ImportError as error:
        runtime.fail(f"DC-AE needs another package: {error}. pip install diffusers")
    return DCAE(AutoencoderDC(**ARCHITECTURE)).eval()
