"""runs/study.py without the perceptual loss, with three times the channels, as many as the encoder is wide: then more of
gFD is the generator's own error, as in the paper. With config/study_wide_dit.py; docs/LOG.md says what it found."""
from config.study_l1_tokenizer import *  # noqa: F401, F403

latent_channels = 96
