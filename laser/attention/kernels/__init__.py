"""Fused attention kernels for TPUs, standard and LASER: `fused.attention`."""
