"""What the app in ``active_learning`` adds to MONAI Label 0.8.5, or puts right in it."""
