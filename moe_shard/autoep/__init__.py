"""Read and write Hugging Face model directories.

Nothing here needs torch. What a directory holds is read from `config.json` and the headers of its
safetensors files, and compared with the abstract model; no device is needed for that.
"""
