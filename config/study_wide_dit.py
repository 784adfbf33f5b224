"""The generators beside config/study_wide_tokenizer.py: twice as wide as the latents have channels."""
from config.study_dit import *  # noqa: F401, F403

size = "192/6/4"
