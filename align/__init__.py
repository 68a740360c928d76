"""SFT, reward modelling, PPO and DPO on one packed batch layout; see ``align --help``."""

from __future__ import annotations

__version__ = "0.1.0"
