"""Tokenizers that gain tokens: sentencepiece models and Hugging Face folders, and embeddings that grow with them."""
