"""The perceptual loss of config/cifar10_tokenizer.py and config/study_tokenizer.py: a VGG that has learned CIFAR-10.
Give it --data_dir=FOLDER."""
out = "out/cifar10_vgg.pt2"
network = "vgg"
epochs = 4
learning_rate = 0.2
