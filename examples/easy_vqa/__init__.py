"""easy-VQA: from a package with pictures and questions to a trained student (docs/easy_vqa.md)."""
