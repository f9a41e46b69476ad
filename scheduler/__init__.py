"""What runs inside one engine, and the theory that sets it. No Ray in here."""
