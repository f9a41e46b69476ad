"""The whole: configuration, Serve application, controller, command line."""
