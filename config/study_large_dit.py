"""The generators beside config/study_large_tokenizer.py: trained twice as long as config/study_wide_dit.py's."""
from config.study_wide_dit import *  # noqa: F401, F403

workers = 2
epochs = 20
decay_epoch = 10.0
ema_momentum = 0.998
save_every = 1000
