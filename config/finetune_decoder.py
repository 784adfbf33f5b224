"""Decoder finetuning (Table 7, right): give it --init_from=CHECKPOINT of the joint training. Sizes and data_dir are
taken over from there; lpips_weight is not."""
out_dir = "out/finetuned"
ssl_method = "none"
alpha = 1.0  # nothing to balance the reconstruction against (Table 7 prints 0, which would leave it out)
adversarial_weight = 0.75
decoder_ema = 0.9978  # RAE's
epochs = 16
batch_size = 256
learning_rate = 2e-4
min_learning_rate = 2e-5
warmup_epochs = 1.0
weight_decay = 0.0
grad_clip = 0.0  # RAE clips nothing
