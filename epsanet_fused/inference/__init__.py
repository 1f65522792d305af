"""Rewrites for inference, each measured."""
