"""runs/study.py on one GPU: beside config/study_wide_vgg_tokenizer.py networks twice as wide, longer training in larger
batches, and an α nearer the paper's 0.1, so that self-supervision weighs more. With config/study_large_dit.py."""
from config.study_wide_vgg_tokenizer import *  # noqa: F401, F403

workers = 4
encoder = "192/4/3"
decoder = "192/4/3"
alpha = 1.0
epochs = 8
batch_size = 192
warmup_epochs = 0.5
freeze_prototypes_epochs = 0.5
teacher_temp_warmup_epochs = 1.5
eval_every = 1000
save_every = 1000
