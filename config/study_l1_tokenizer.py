"""runs/study.py without the perceptual loss, whose VGG has learned the labels, so that only self-supervision can teach
the tokens what they show; five epochs, and local crops. docs/LOG.md says what it found."""
from config.study_tokenizer import *  # noqa: F401, F403

lpips_weight = 0.0
alpha = 3.0
epochs = 5
local_crops = 2
local_crop_scale = (0.1, 0.4)
