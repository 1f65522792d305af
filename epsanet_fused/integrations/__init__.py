"""epsanet_fused inside other packages: each module is imported only when asked for."""
