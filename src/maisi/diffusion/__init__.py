"""Diffusion processes and samplers: mathematics with no network in it."""

from maisi.diffusion.ddpm import DDPM
from maisi.diffusion.guidance import guided, noisier
from maisi.diffusion.process import Process, process_from_config
from maisi.diffusion.rectified_flow import RectifiedFlow
from maisi.diffusion.sampler import Denoiser, sample

__all__ = ["DDPM", "Denoiser", "Process", "RectifiedFlow", "guided", "noisier", "process_from_config", "sample"]
