"""The perceptual loss of config/cifar10_tokenizer.py and config/study_tokenizer.py: a VGG that has learned CIFAR-10.
Give it --data_dir=FOLDER."""
out = "out/cifar10_vgg.pt2"
network = "vgg"
width = 32
batch_size = 256
epochs = 4
optimizer = "sgd"
learning_rate = 0.2
weight_decay = 5e-4
label_smoothing = 0.1
shift = 4
