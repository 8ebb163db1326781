// Score images with OpenVINO in C++: score_images model.xml image.ppm ...
// The file was exported with camera bytes. Images are read from binary PPM files, which needs no other library; a camera's
// buffer (blue, green, red for each pixel) goes into the tensor as it is.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <utility>

ov::Tensor read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    size_t width = 0, height = 0, highest = 0;
    file >> kind >> width >> height >> highest;
    file.get();
    if (!file || kind != "P6" || highest != 255) throw std::runtime_error(path + " is no binary PPM file of 8 bits");
    ov::Tensor image(ov::element::u8, {1, height, width, 3});
    auto* bytes = image.data<uint8_t>();
    file.read(reinterpret_cast<char*>(bytes), static_cast<std::streamsize>(image.get_byte_size()));
    if (!file) throw std::runtime_error(path + " is truncated");
    for (size_t pixel = 0; pixel < height * width; ++pixel) std::swap(bytes[3 * pixel], bytes[3 * pixel + 2]);
    return image;
}

int main(int count, char* arguments[]) try {
    if (count < 3) throw std::runtime_error("usage: score_images model.xml image.ppm ...");
    ov::Core core;
    auto model = core.compile_model(arguments[1], "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = model.create_infer_request();
    for (int index = 2; index < count; ++index) {
        request.set_input_tensor(read_ppm(arguments[index]));
        request.infer();
        const float score = request.get_tensor("pred_score").data<float>()[0];
        const bool anomalous = request.get_tensor("pred_label").data<bool>()[0];
        std::printf("%s %.6f %s\n", arguments[index], score, anomalous ? "anomalous" : "good");
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
