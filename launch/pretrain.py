"""Pretrains a model: `deepspeed launch/pretrain.py --config configs/tiny.yaml [section.key=value ...]`."""

from megassm.commands.train import run

if __name__ == "__main__":
    run()
