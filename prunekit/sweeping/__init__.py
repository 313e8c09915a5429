"""How much can go before a model breaks: many pruned copies, one question each way, one table."""
