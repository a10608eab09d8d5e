"""Your own training loop in your own Optuna study; nas_kd proposes students within the budget and exports the best.

python own_loop.py [--trials 8] [--epochs 4] [--out small]
"""

import argparse

import optuna
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nas_kd


def data(part: slice) -> DataLoader:
    """The handwritten digits that ship with scikit-learn; put your own here."""
    digits = load_digits()
    images = torch.tensor(digits.images[part], dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(16, 16))
    return DataLoader(TensorDataset(images, torch.tensor(digits.target[part])), batch_size=64, shuffle=True)


def train(network: nn.Module, epochs: int, teacher: nn.Module | None = None) -> float:
    """Plain training, or beside a teacher; returns the accuracy on images that it did not see."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for _ in range(epochs):
        network.train()
        for images, labels in data(slice(0, 1200)):
            logits = network(images)
            loss = nn.functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(images)
                loss = 0.1 * loss + 0.9 * nas_kd.distillation_loss(logits, soft, temperature=4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = [(network(images).argmax(1) == labels).float() for images, labels in data(slice(1200, 1500))]
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", default="small")
    arguments = parser.parse_args()

    teacher = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    print(f"teacher: {train(teacher, 2 * arguments.epochs):.1%}")
    space = nas_kd.Space(teacher, budget="macs=50%", img_size=16)

    def objective(trial: optuna.Trial) -> float:
        return train(space.suggest(trial), epochs=1, teacher=teacher)  # over budget: pruned before it trains

    study = optuna.create_study(direction="maximize")
    space.enqueue(study)
    study.optimize(objective, n_trials=arguments.trials)

    student = space.student(study.best_trial)
    cost = space.cost(space.genotype(study.best_params))
    accuracy = train(student, arguments.epochs, teacher)
    print(f"student: {accuracy:.1%}, {cost.params:,} params, {cost.macs:,} MACs")
    nas_kd.export(student, arguments.out, nas_kd.Card(input_size=(1, 16, 16)))


if __name__ == "__main__":
    main()
