from vireo import config


def test_the_demonstration_says_whose_clips_it_learns_from(tmp_path):
    def said(*words):
        return config.banner(config.settings(["experiment=ip2p_video", "size=mini", *words]), tmp_path)

    assert "This is the demonstration: small weights, generated clips." in said()
    assert "This is the demonstration: small weights, your clips made small." in said(f"paths.data={tmp_path}")
