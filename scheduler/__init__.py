"""The scheduler inside one engine, and the queueing model that sets its thresholds. No Ray in here."""
