"""Hugging Face model directories: what is in them, and the way of their tensors in and out.

Nothing here needs torch, and nothing but `importing` and `blocks` needs jax: what a directory holds
is read from `config.json` and the headers of its safetensors files.
"""
