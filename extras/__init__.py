"""What one may skip: pictures, measurements, conversion.  python -m extras.visualize"""
