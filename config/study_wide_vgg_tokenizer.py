"""runs/study.py with 96 channels, as config/study_wide_tokenizer.py, and with the perceptual loss again: all of the paper's
terms, and reconstructions so good that gFD is mostly the generator's own error. docs/LOG.md says what it found."""
from config.study_wide_tokenizer import *  # noqa: F401, F403

lpips_weight = 1.0
