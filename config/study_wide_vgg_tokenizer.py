"""runs/study.py with 96 channels, as config/study_wide_tokenizer.py, but with the perceptual loss again: all of the
paper's terms, and better reconstructions, so that more of gFD is the generator's own error. docs/LOG.md has the result."""
from config.study_wide_tokenizer import *  # noqa: F401, F403

lpips_weight = 1.0
