"""The generator on the latents of config/images64_tokenizer.py."""
tokenizer = "out/images64_tokenizer/checkpoint.pt"
out_dir = "out/images64_dit"
size = "S"
batch_size = 256
optimizer = "muon"
learning_rate = 1e-3
epochs = 200
decay_epoch = 100.0
warmup_steps = 200
ema_momentum = 0.999
sample_cfg_scale = 2.0
