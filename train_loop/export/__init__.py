"""The finished model: its folder and card, its verification in a clean process, its upload."""
