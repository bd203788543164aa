"""One batched decoder for all who answer: chat, generate, evaluation."""
