"""The generator on CIFAR-10's latents, after config/cifar10_tokenizer.py: two CPU cores with bfloat16, 43
minutes. On a GPU take --size=384/12/6 --epochs=200 --decay_epoch=100."""
tokenizer = "out/cifar10_tokenizer/checkpoint.pt"
out_dir = "out/cifar10_dit"
workers = 1
size = "192/6/6"
epochs = 30
batch_size = 128
optimizer = "muon"
learning_rate = 2e-3
decay_epoch = 15.0
warmup_steps = 200
ema_momentum = 0.999
save_every = 1000
sample_every = 2000
sample_cfg_scale = 2.0
