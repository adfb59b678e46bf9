"""`make guests`: makes everything the guest tests need ahead of time, so that no test waits for a download."""

from tests.support.guest.daemons import RustDaemon
from tests.support.guest.images import all_images

if __name__ == "__main__":
    for image in all_images():
        print(f"{image.name}: {image.kernel}, {image.initramfs}")
    print(f"Rust virtiofsd: {RustDaemon('/', socket_folder=None).argv()[3]}")
