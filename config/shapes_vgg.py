"""The perceptual loss of config/shapes_tokenizer.py: a VGG that has learned the shapes' classes."""
data_dir = "shapes"
network = "vgg"
width = 16
epochs = 2
batch_size = 128
optimizer = "sgd"
learning_rate = 0.2
weight_decay = 5e-4
label_smoothing = 0.1
augmented = False  # from moved and mirrored shapes it learns a worse loss (docs/LOG.md)
