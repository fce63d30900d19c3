// The training of LeNet-300-100 at 1 % in batches of 10, as one writes it in C++ for a PC: vectors, a gradient and a sign per connection, a bit per
// place, a generator of the standard library. speed.py compares the exported program with it. Compile with -DDATA='"folder of MNIST/"'.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

constexpr int B = 10;
static std::mt19937_64 generator(0);

struct Layer {
    int rows, columns, count;
    std::vector<int> row, column;
    std::vector<float> theta, sign, gradient, bias;
    std::vector<bool> taken, negative;

    Layer(int rows, int columns, int count)
        : rows(rows), columns(columns), count(count), row(count), column(count), theta(count), sign(count), gradient(count),
          bias(rows), taken(rows * columns), negative(rows * columns)
    {
        std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
        for (int i = 0; i < rows * columns; i++)
            negative[i] = generator() & 1;
        for (int k = 0; k < count; k++) {
            draw(k);
            theta[k] = uniform(generator) / std::sqrt(float(columns)) * std::sqrt(float(rows) * columns / count);
        }
    }

    void draw(int k)
    {
        int place;
        do
            place = int(generator() % (rows * columns));
        while (taken[place]);
        taken[place] = true;
        row[k] = place / columns;
        column[k] = place % columns;
        sign[k] = negative[place] ? -1.0f : 1.0f;
        theta[k] = 0.0f;
    }

    void forward(const float *in, float *out, bool relu) const
    {
        for (int r = 0; r < rows; r++)
            std::fill(out + r * B, out + r * B + B, bias[r]);
        for (int k = 0; k < count; k++) {
            const float w = sign[k] * theta[k], *x = in + column[k] * B;
            float *y = out + row[k] * B;
            for (int b = 0; b < B; b++)
                y[b] += w * x[b];
        }
        for (int i = 0; relu && i < rows * B; i++)
            out[i] = std::max(out[i], 0.0f);
    }

    void backward(const float *in, const float *delta, float *before)
    {
        if (before)
            std::fill(before, before + columns * B, 0.0f);
        for (int k = 0; k < count; k++) {
            const float w = sign[k] * theta[k], *x = in + column[k] * B, *d = delta + row[k] * B;
            float sum = 0.0f;
            for (int b = 0; b < B; b++)
                sum += d[b] * x[b];
            gradient[k] = sum;
            if (before)
                for (int b = 0; b < B; b++)
                    before[column[k] * B + b] += w * d[b];
        }
        for (int i = 0; before && i < columns * B; i++)
            before[i] = in[i] > 0.0f ? before[i] : 0.0f;
    }

    int step(const float *delta, float lr, float alpha)
    {
        std::vector<int> dead;
        for (int k = 0; k < count; k++) {
            theta[k] -= lr * (sign[k] * gradient[k] + alpha);
            if (theta[k] < 0.0f) {
                taken[row[k] * columns + column[k]] = false;
                dead.push_back(k);
            }
        }
        for (int k : dead)
            draw(k);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < B; b++)
                bias[r] -= lr * delta[r * B + b];
        return int(dead.size());
    }
};

static std::vector<unsigned char> read(const char *name)
{
    std::ifstream file(name, std::ios::binary);
    return std::vector<unsigned char>((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

int main()
{
    const std::vector<unsigned char> images = read(DATA "train-images-idx3-ubyte"), labels = read(DATA "train-labels-idx1-ubyte");
    if (images.size() != 16 + 784 * 60000 || labels.size() != 8 + 60000)
        return 1;
    Layer one(300, 784, 1764), two(100, 300, 690), three(10, 100, 208);
    std::vector<float> x(784 * B), h1(300 * B), h2(100 * B), z(10 * B), d1(300 * B), d2(100 * B);
    const int steps = STEPS;
    double loss = 0.0;
    const std::clock_t begin = std::clock();
    for (int s = 0; s < steps; s++) {
        for (int b = 0; b < B; b++)
            for (int i = 0; i < 784; i++)
                x[i * B + b] = images[16 + 784 * (s * B + b) + i] / 255.0f;
        one.forward(x.data(), h1.data(), true);
        two.forward(h1.data(), h2.data(), true);
        three.forward(h2.data(), z.data(), false);
        for (int b = 0; b < B; b++) {
            float largest = z[b], sum = 0.0f;
            for (int c = 1; c < 10; c++)
                largest = std::max(largest, z[c * B + b]);
            for (int c = 0; c < 10; c++)
                sum += z[c * B + b] = std::exp(z[c * B + b] - largest);
            const int label = labels[8 + s * B + b];
            loss -= std::log(z[label * B + b] / sum);
            for (int c = 0; c < 10; c++)
                z[c * B + b] = (z[c * B + b] / sum - (c == label)) / B;
        }
        three.backward(h2.data(), z.data(), d2.data());
        two.backward(h1.data(), d2.data(), d1.data());
        one.backward(x.data(), d1.data(), nullptr);
        three.step(z.data(), 0.4f, 2e-4f);
        two.step(d2.data(), 0.4f, 2e-4f);
        one.step(d1.data(), 0.4f, 2e-4f);
    }
    std::printf("%.3f us per step, loss %.3f\n", 1e6 * double(std::clock() - begin) / CLOCKS_PER_SEC / steps, loss / steps / B);
    return 0;
}
