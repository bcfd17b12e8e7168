"""What is particular to Hugging Face folders: config.json in every spelling, and the files beside the weights."""
