"""Trains the classifier behind the features `fashion-mnist-cnn` and writes its weight file; minutes on one core.

    python studies/train_fashion_mnist_cnn.py weights.safetensors

The file holds float16 weights, and in its metadata the accuracy on the 10,000 test images. Bits depend on the version of
torch and on the CPU, so a new file is another feature network: `WEIGHTS_SHA256` of `evaluators/features/fashion_mnist_cnn.py`
names the one that is shipped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

from evaluators.features.fashion_mnist_cnn import FashionMNISTCNN, folded, preprocess
from harness.data import fashion_mnist
from harness.io.progress import Bar

TRAINING_IMAGES = 60_000  # the first images of the data set; the others are for testing
EPOCHS = 6
BATCH = 128
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="weight file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # sums in one order
    torch.manual_seed(SEED)
    data = fashion_mnist.load().downsampled(16)
    x, y = preprocess(torch.from_numpy(data.images)), torch.from_numpy(data.labels)  # (70000, 1, 16, 16), (70000,)
    net = train(x[:TRAINING_IMAGES], y[:TRAINING_IMAGES])
    small = folded(net.eval()).half().float()  # rounded as it is stored
    found = accuracy(small, x[TRAINING_IMAGES:], y[TRAINING_IMAGES:])
    tensors = {name: tensor.half().contiguous() for name, tensor in small.state_dict().items()}
    save_file(tensors, out, metadata={"test_accuracy": json.dumps(found), "torch": torch.__version__})
    print(f"{out}: {found:.4f} of {len(x) - TRAINING_IMAGES} test images are classified rightly")


def train(x: torch.Tensor, y: torch.Tensor) -> FashionMNISTCNN:
    """A network trained on images x, float32 (N, 1, 16, 16), and labels y, int64 (N,); shifted by up to one pixel."""
    net = FashionMNISTCNN(norms=True)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    random = np.random.default_rng(SEED)
    with Bar("train", steps, "steps") as bar:
        for _ in range(EPOCHS):
            order = torch.from_numpy(random.permutation(len(x)))
            for rows in order[: len(x) // BATCH * BATCH].split(BATCH):
                shift = tuple(int(value) for value in random.integers(-1, 2, size=2))
                batch = torch.roll(x[rows], shift, dims=(2, 3))  # (128, 1, 16, 16)
                loss = functional.cross_entropy(net(batch)[1], y[rows], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.advance()
    return net


@torch.inference_mode()
def accuracy(net: FashionMNISTCNN, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images x, float32 (N, 1, 16, 16), whose class in y, int64 (N,), has the largest logit."""
    right = sum(
        int((net(batch)[1].argmax(1) == labels).sum()) for batch, labels in zip(x.split(500), y.split(500), strict=True)
    )
    return right / len(x)


if __name__ == "__main__":
    main()
