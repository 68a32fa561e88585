"""Read and write Hugging Face model directories.

Nothing here needs torch, and nothing but `importing` and `blocks` needs jax: what a directory holds
is read from `config.json` and the headers of its safetensors files.
"""
