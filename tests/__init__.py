"""The tests. Only test_app.py knows what the application says; the rest holds for any that answers /health."""
