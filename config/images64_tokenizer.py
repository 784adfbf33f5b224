"""A beginning for images of your own at 64 px on one GPU (nothing here is tuned): give it --data_dir=FOLDER.

256 tokens become 64, and 4 × 4 latents of 32 channels: both stages of compression, 24-fold as in the paper."""
out_dir = "out/images64_tokenizer"
image_size = 64
patch_size = 4
downsample = 16
latent_channels = 32
global_crop_size = 56  # 7 × 7 tokens; a multiple of 2 p, or of p without staging
local_crop_size = 24  # 3 × 3; the same
teacher_temp = (0.02, 0.03)  # lower than for ImageNet, as in the other small configs
teacher_momentum = 0.99  # fewer steps than ImageNet's 125,000
batch_size = 256
optimizer = "muon"
learning_rate = 2e-3
warmup_epochs = 2.0
